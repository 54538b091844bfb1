from agent.engine.environment import engine_environment


def test_what_configures_the_engine_or_holds_secrets_does_not_reach_it():
    base = {
        "LLAMA_ARG_TOOLS": "all",
        "LLAMA_API_KEY": "k",
        "GGML_CUDA_FORCE_MMQ": "1",
        "MTMD_BACKEND_DEVICE": "CPU",
        "HF_TOKEN": "t",
        "AIP_MODE": "PREDICTION",
        "REDIS_PASSWORD": "p",
        "LD_PRELOAD": "/tmp/x.so",
        "PYTHONPATH": "/tmp",
    }
    assert set(engine_environment(base)) == {"PATH", "LANG", "GGML_NO_BACKTRACE"}


def test_which_gpus_are_visible_is_kept():
    visible = {
        "CUDA_VISIBLE_DEVICES": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HIP_VISIBLE_DEVICES": "0",
        "ROCR_VISIBLE_DEVICES": "0",
        "GGML_VK_VISIBLE_DEVICES": "0",
        "ZE_AFFINITY_MASK": "0",
    }
    assert visible.items() <= engine_environment(visible).items()


def test_path_home_and_language_are_kept_and_have_defaults():
    kept = {"PATH": "/opt/bin", "HOME": "/home/a", "LANG": "de_DE.UTF-8"}
    assert engine_environment(kept) == kept | {"GGML_NO_BACKTRACE": "1"}
    assert engine_environment({}) == {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "GGML_NO_BACKTRACE": "1",
    }


def test_an_abort_never_waits_for_a_debugger():
    assert engine_environment({"GGML_NO_BACKTRACE": "0"})["GGML_NO_BACKTRACE"] == "1"
