"""The operator CLI."""


def main() -> None: ...
