"""The first thing on the page: what was planned, and how true the prediction was."""

from __future__ import annotations

from shardwise.planner.plan import Plan
from shardwise.report.markup import Markup, element, join
from shardwise.report.measured import Measured
from shardwise.report.units import bytes_text, error_text, rate_text, seconds_text
from shardwise.simulate.simulator import Simulation

__all__ = ["header"]

_TIME_BOUND, _MEMORY_BOUND = 0.25, 0.15  # how far off a prediction may be and still be called good
_SAME_BOUND = 1e-5  # relative; what float32 allows


def header(plan: Plan, simulation: Simulation, measured: Measured | None) -> Markup:
    """Title, layout, and a card for each figure that matters."""
    cards = [_time_card(plan, simulation, measured), _memory_card(simulation, measured)]
    if measured is not None and measured.same_numbers is not None:
        cards.append(_numbers_card(measured.same_numbers))
    if measured is not None and len(measured.losses) > 1:
        cards.append(_loss_card(measured.losses))
    if measured is None:
        cards.append(_use_card(simulation))
    title = element("h1", plan.model, element("span", f" on {plan.cluster}", class_="soft"))
    return element(
        "header", element("p", "shardwise report", class_="kicker"), title, _layout(plan), element("div", *cards, class_="cards")
    )


def _layout(plan: Plan) -> Markup:
    axes = [("dp", plan.dp, "data parallel"), ("tp", plan.tp, "tensor parallel"), ("pp", plan.pp, "pipeline stages")]
    if plan.cp > 1:
        axes.insert(1, ("cp", plan.cp, "context parallel"))
    if plan.ep > 1:
        axes.insert(-1, ("ep", plan.ep, "expert parallel, among the data ranks"))
    chips = [element("span", f"{name} {size}", class_="chip", title=title) for name, size, title in axes]
    parts = [f"{plan.microbatches} microbatch{'es' if plan.microbatches > 1 else ''}"] + ([plan.schedule] if plan.pp > 1 else [])
    parts += [f"global batch {plan.global_batch}", plan.optimizer, plan.backend]
    return element("p", *chips, *(element("span", part, class_="chip") for part in parts), class_="chips")


def _card(title: str, *children: str) -> Markup:
    return element("section", element("h2", title), *children, class_="card figure")


def _big(text: str) -> Markup:
    return element("p", text, class_="big")


def _against(predicted: float, measured: float, text: str, bound: float) -> Markup:
    good = abs(predicted / measured - 1) <= bound if measured else False
    pill = element("span", error_text(predicted, measured), class_="pill good" if good else "pill off", title="the prediction's error")
    return element("p", f"predicted {text} ", pill, class_="soft")


def _time_card(plan: Plan, simulation: Simulation, measured: Measured | None) -> Markup:
    predicted = seconds_text(simulation.step_time_s)
    if measured is None:
        speed = rate_text(plan.global_batch / simulation.step_time_s, "samples")
        return _card("Step time, predicted", _big(predicted), element("p", speed, class_="soft"))
    line = _against(simulation.step_time_s, measured.step_time_s, predicted, _TIME_BOUND)
    return _card("Step time, measured", _big(seconds_text(measured.step_time_s)), line)


def _memory_card(simulation: Simulation, measured: Measured | None) -> Markup:
    predicted = simulation.memory_bytes
    fullest = max(range(len(predicted)), key=predicted.__getitem__)
    if measured is None or len(measured.memory_bytes) != len(predicted):
        kinds = sorted(simulation.memory[fullest].items(), key=lambda pair: -pair[1])[:2]
        most = ", ".join(f"{kind} {bytes_text(size)}" for kind, size in kinds)
        return _card(f"Peak memory, predicted, rank {fullest}", _big(bytes_text(predicted[fullest])), element("p", most, class_="soft"))
    fullest = max(range(len(predicted)), key=measured.memory_bytes.__getitem__)
    line = _against(predicted[fullest], measured.memory_bytes[fullest], bytes_text(predicted[fullest]), _MEMORY_BOUND)
    return _card(f"Peak memory, measured, rank {fullest}", _big(bytes_text(measured.memory_bytes[fullest])), line)


def _numbers_card(error: float) -> Markup:
    line = element("p", f"largest relative error {error:.1e}, every gradient compared", class_="soft")
    return _card("Same numbers as one device", _big("yes" if error <= _SAME_BOUND else "NO"), line)


def _loss_card(losses: list[float]) -> Markup:
    line = element("p", f"from {losses[0]:.3f} in {len(losses)} steps", class_="soft")
    return _card("Loss", join(_big(f"{losses[-1]:.3f}"), _sparkline(losses)), line)


def _sparkline(values: list[float]) -> Markup:
    low, high = min(values), max(values)
    height = max(high - low, 1e-12)
    points = " ".join(f"{100 * index / (len(values) - 1):.1f},{30 - 28 * (value - low) / height:.1f}" for index, value in enumerate(values))
    line = element("polyline", points=points)
    return element(
        "svg", line, class_="sparkline", viewBox="0 0 100 32", preserveAspectRatio="none", role="img", aria_label="loss over the steps"
    )


def _use_card(simulation: Simulation) -> Markup:
    line = element("p", f"the busiest communicates {seconds_text(simulation.communication_s)} a step", class_="soft")
    return _card("Ranks wait, of their time", _big(f"{simulation.bubble:.0%}"), line)
