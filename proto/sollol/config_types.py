"""Types of settings, with the ranges and choices that both daemons share."""

from typing import Annotated

from msgspec import Meta

Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]
Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
LogLevel = Annotated[str, Meta(pattern="^(debug|info|warning|error)$", description="The least urgent line to log")]
LogFormat = Annotated[str, Meta(pattern="^(auto|console|json)$", description="auto: console on a terminal, else json")]
