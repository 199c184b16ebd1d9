"""What a server allows. Imports nothing slow: the command line makes its options of these fields."""

from __future__ import annotations

from dataclasses import dataclass

from speechllm.config import check_limits, setting


@dataclass(frozen=True)
class ServeOptions:
    """Limits of a server; `speechllm serve --help` says what each field is.

    Raises:
      UserError: a value is out of range.
    """

    max_streams: int = setting(
        32, at_least=1, help="uploads and live streams that are served at a time; more are answered 429"
    )
    max_upload_bytes: int = setting(100 * 2**20, at_least=1, help="size of the largest upload")
    upload_seconds: float = setting(300.0, above=0, help="time that an upload has to arrive in")
    max_audio_seconds: float = setting(4 * 3600.0, above=0, help="longest recording")
    max_message_bytes: int = setting(2**20, at_least=1024, help="size of the largest message of live audio")
    max_session_seconds: float = setting(3600.0, above=0, help="longest connection of live audio")
    idle_seconds: float = setting(60.0, above=0, help="live audio: how long a client may say nothing")
    max_connections: int = setting(256, at_least=1, help="open connections; more are refused at once")
    requests_per_minute: int = setting(600, at_least=1, help="requests of one address; more are answered 429")
    drain_seconds: float = setting(30.0, at_least=0, help="after SIGTERM: time for what is being served")

    def __post_init__(self) -> None:
        check_limits(self)
