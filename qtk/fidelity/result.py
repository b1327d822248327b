"""What a comparison found, as an object, a table and JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from qtk.table import finite, listed

SHOWN = 3  # of the worst samples, in a table
SEEN = 5e-5  # share of clipped inputs that a table shows: .01 % when rounded
MANY = 0.01  # share of one layer's inputs beyond its grid; same data as in calibration gives .005
HINT = (
    "many inputs are beyond the calibrated range: if these samples are longer than those of the "
    "calibration or of another kind, calibrate on such as these, or quantize with "
    "activations='token' or method='rotate'"
)


@dataclass(frozen=True)
class Fidelity:
    """What quantization cost.

    Attributes:
        samples: outputs compared: sentences, images or tokens.
        cosine: mean cosine between float and quantized embeddings; `worst_cosine` of the worst one.
            None for predictions, of whose logits it says nothing.
        sqnr: signal to quantization noise of all outputs, dB; infinite when nothing differs. Of
            logits after their mean is taken off, which no prediction depends on.
        kl: mean KL(float || quantized) of the predicted distributions, nats; None for embeddings.
        agreement: share of samples with the same answer: the arg max of the logits, or the nearest
            other sample for embeddings; None where there is nothing to choose from.
        metric_name, metric_float, metric_quantized: "accuracy" or "perplexity" where there are
            labels; None otherwise.
        worst_kl: of the worst output.
        worst: the ten worst samples, worst first: where each stands in the data (its position in a
            list, "line 7" of a file, an image's path) and its cosine, KL divergence (the mean of
            its tokens) or error.
        clipped: by layer, the share of inputs beyond the ends of its static grid, on some of the
            data; empty where no layer has one.
    """

    samples: int
    cosine: float | None
    worst_cosine: float | None
    sqnr: float
    kl: float | None = None
    agreement: float | None = None
    metric_name: str | None = None
    metric_float: float | None = None
    metric_quantized: float | None = None
    worst_kl: float | None = None
    worst: tuple[tuple[int | str, float], ...] = ()
    clipped: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: a figure that is not finite becomes None."""
        return finite(asdict(self))

    def table(self) -> str:
        """Two columns of plain text, and a hint where inputs leave the calibrated range."""
        rows = [("samples", f"{self.samples}")]
        if self.cosine is not None:
            rows.append(("cosine, mean", f"{self.cosine:.5f}"))
            rows.append(("cosine, worst", f"{self.worst_cosine:.5f}"))
        if self.kl is not None:
            rows.append(("KL divergence, mean", f"{self.kl:.5f} nats"))
        if self.worst_kl is not None:
            rows.append(("KL divergence, worst", f"{self.worst_kl:.5f} nats"))
        of = "" if self.cosine is not None else " of the logits" if self.kl is not None else ""
        rows.append((f"SQNR{of}", f"{self.sqnr:.2f} dB"))
        if self.agreement is not None:
            rows.append(("same answer", f"{100 * self.agreement:.2f} %"))
        if self.metric_name and self.metric_float is not None:
            rows.append((f"{self.metric_name}, float", f"{self.metric_float:.4f}"))
            rows.append((f"{self.metric_name}, quantized", f"{self.metric_quantized:.4f}"))
        if self.worst:
            shown = ", ".join(f"{name} ({value:.4f})" for name, value in self.worst[:SHOWN])
            rows.append(("worst samples", shown))
        layer = max(self.clipped, key=lambda name: self.clipped[name], default="")
        share = self.clipped.get(layer, 0.0)
        if share >= SEEN:
            rows.append(("clipped at most", f"{100 * share:.2f} % of the inputs of {layer}"))
        return "\n".join([*listed(rows), *([HINT] if share > MANY else [])])
