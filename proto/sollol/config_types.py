"""Types of settings, with the ranges and choices that both daemons share."""

from typing import Annotated

from msgspec import Meta

Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]
Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
LogLevel = Annotated[str, Meta(pattern="^(debug|info|warning|error)$", description="The least urgent line to log")]
LogFormat = Annotated[str, Meta(pattern="^(auto|console|json)$", description="auto: console on a terminal, else json")]
MqttUrl = Annotated[
    str, Meta(description="The MQTT 5 broker, mqtt://USER:PASSWORD@HOST:1883 or mqtts://...; empty: none, MQTT is off")
]
MqttPasswordFile = Annotated[str, Meta(description="A file with that user's password; it wins over the URL's")]
MqttCaFile = Annotated[str, Meta(description="Whose certificates mqtts:// trusts, a PEM file; empty: the system's")]
MqttCluster = Annotated[
    str,
    Meta(min_length=1, description="The cluster's name in topics, sollol/v1/NAME/...; the same on heads and agents"),
]
MqttDiscoveryPrefix = Annotated[
    str,
    Meta(min_length=1, description="The topic below which Home Assistant reads configuration; for nobody's answers"),
]
