"""Loggers for all modules. The kernel process imports this, so structlog is loaded only when the first line is logged."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger


_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "exception": 40, "critical": 50}
_least = _LEVELS["warning"]


class _LazyLogger:
    """Loads structlog for the first line that is shown: importing it costs more than claiming a machine does."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._logger: BoundLogger | None = None

    def __getattr__(self, attribute: str) -> Any:
        if _LEVELS.get(attribute, _least) < _least:
            return _ignore
        if self._logger is None:
            import structlog

            if not structlog.is_configured():
                configure()
            self._logger = structlog.get_logger(self._name)
        return getattr(self._logger, attribute)


def _ignore(*_: Any, **__: Any) -> None:
    pass


def get_logger(name: str) -> Any:
    """Return a structlog logger for the module `name`; log with `.info("event", key=value)`."""
    return _LazyLogger(name)


def configure(*, level: str = "warning", json: bool = False) -> None:
    """Send log lines to standard error.

    Args:
        level: least level shown: debug, info, warning or error.
        json: JSON lines for programs instead of coloured text for people.
    """
    import sys

    import structlog

    global _least
    _least = _LEVELS[level]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer()
            if json
            else structlog.dev.ConsoleRenderer(
                # The default shows local variables: secrets, and pages of text.
                colors=sys.stderr.isatty(),
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
