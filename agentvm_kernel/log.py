"""Loggers for all modules. The kernel process imports this, so structlog is loaded only when the first line is logged."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger


class _LazyLogger:
    """Loads structlog on first use: importing it costs more than claiming a machine does."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._logger: BoundLogger | None = None

    def __getattr__(self, attribute: str) -> Any:
        if self._logger is None:
            import structlog

            self._logger = structlog.get_logger(self._name)
        return getattr(self._logger, attribute)


def get_logger(name: str) -> Any:
    """Return a structlog logger for the module `name`; log with `.info("event", key=value)`."""
    return _LazyLogger(name)


def configure(*, level: str = "warning", json: bool = False) -> None:
    """Send log lines to standard error.

    Args:
        level: least level shown: debug, info, warning or error.
        json: JSON lines for programs instead of coloured text for people.
    """
    import logging
    import sys

    import structlog

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
