"""How the tour shows its scores: a table with a line for each method and scale, and curves."""

from typing import TYPE_CHECKING

from guidance_nb._extras import extra
from guidance_nb.plots import COLOURS, METHOD_LABELS, show_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

METHODS = (
    *("none", "exact", "classifier_guidance", "classifier_free_guidance"),
    *("aligned_loss", "model_guidance", "flow_postprocessing"),
)
METRICS = {
    "fractal": ("outlier_rate", "coverage", "sliced_wasserstein", "nll", "class_accuracy"),
    "digits": ("class_accuracy", "frechet", "precision", "recall", "nearest_train_distance"),
}


def summary(
    table: "DataFrame",  # Rows of the tour, comparison.csv
    real: "DataFrame",  # Rows of real samples, baseline.csv
    data: str,  # One of `METRICS`
) -> "DataFrame":  # Strings, one line per method and scale
    """Means over seeds, with standard deviations if there are several; the
    last line is the real-data baseline."""

    def text(values: "Series") -> str:
        spread = f" ±{values.std():.2g}" if len(values) > 1 and values.std() > 0 else ""
        return f"{values.mean():.3g}{spread}"

    metrics = METRICS[data]
    groups = table[table.data == data].groupby(["method", "scale"], sort=False)
    lines = groups[["nfe", *metrics]].agg(text).reset_index()
    lines["method"] = lines["method"].map(METHOD_LABELS)
    lines["scale"] = lines["scale"].map("{:g}".format)
    baseline = {metric: text(real[real.data == data][metric]) for metric in metrics}
    lines.loc[len(lines)] = {"method": "real samples", "scale": "", "nfe": "", **baseline}
    return lines.rename(columns=lambda name: name.replace("_", " "))


def show_scores(
    table: "DataFrame",  # Rows of the tour, comparison.csv
    real: "DataFrame",  # Rows of real samples, baseline.csv
    data: str,  # One of `METRICS`
    # Rows with fewer steps, cost.csv: draw against NFE, not against the scale
    cost: "DataFrame | None" = None,
    metrics: tuple[str, ...] = (),  # Metrics to draw, all by default
) -> "Figure":  # One panel per metric
    "Curves of quality by method; dashed lines are the real-data baseline."
    with extra("plots"):
        import pandas as pd
        from matplotlib import pyplot

    rows, metrics = table[table.data == data], metrics or METRICS[data]
    if cost is not None:  # few and many steps together, at the scales that have both
        fewer = cost[cost.data == data].astype({"scale": float})
        both = fewer[["method", "scale"]].drop_duplicates()
        rows = pd.concat([fewer, rows.merge(both, on=["method", "scale"])])
    fig, axes = pyplot.subplots(1, len(metrics), figsize=(2.8 * len(metrics), 3.2), layout="constrained")
    for ax, metric in zip(axes, metrics):
        show_curves(rows, "scale" if cost is None else "nfe", metric, ax=ax)
        ax.axhline(real[real.data == data][metric].mean(), color="black", ls="--", lw=0.8)
        if cost is None:  # no guidance is one model, whatever the scale
            level = rows[rows.method == "none"][metric].mean()
            ax.axhline(level, color=COLOURS["none"], lw=1.5, zorder=0)
        ax.set(xlabel=ax.get_xlabel().replace("nfe", "NFE"), ylabel=metric.replace("_", " "))
        ax.get_legend().remove()
        if metric in ("outlier_rate", "sliced_wasserstein", "frechet"):
            ax.set_yscale("log")
        if metric == "nll":
            ax.set_yscale("symlog", linthresh=1)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = min(len(labels), 1 + len(metrics))
    fig.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return fig
