"""Reports: a page for people and a trace for Perfetto."""

from shardwise.report.measured import Measured
from shardwise.report.page import write_report
from shardwise.report.trace import save_traces

__all__ = ["Measured", "save_traces", "write_report"]
