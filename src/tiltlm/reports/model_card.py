"""The model card of a tuned model: its target, its figures, its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from tiltlm.reports.summary import prompts_in_words

# Without the guide file, the saved weights define a different distribution from the one that was measured.
KEPT_GUIDE = """These figures are of the weights **together with `guide.safetensors`**, which reweights each next token.
tiltlm loads both; in transformers, pass the guide to every `generate`:

```python
from tiltlm.lm import Guide, GuideProcessor

guide = Guide.load("guide.safetensors")
model.generate(**inputs, logits_processor=[GuideProcessor(guide, prompt_length=inputs["input_ids"].shape[1])])
```

"""


def model_card(
    base: str, config: Mapping[str, Any], target: Mapping[str, Any], evaluation: Mapping[str, Any], *, keeps_guide: bool
) -> str:
    """Markdown with the target, the figures and the configuration.

    ``target`` and ``evaluation`` (of the tuned model) are the sections of ``run.json``.
    """
    rows = []
    for feature in target["features"]:
        goal = "" if feature["goal"] is None else f"{feature['goal']:g}"
        name, tuned = feature["name"], _estimate(evaluation["moments"][feature["name"]])
        rows.append(f"| {_cell(name)} | {feature['kind']} | {goal} | {_estimate(feature['base'])} | {tuned} |")
    prompts = prompts_in_words(evaluation)
    where = f" on {prompts}" if prompts else ""
    adapter = "peft" if config.get("peft") else "transformers"
    kept = KEPT_GUIDE if keeps_guide else ""
    return f"""---
library_name: {adapter}
tags: [tiltlm, distribution-matching]
---

# {_cell(base)}, tuned toward a target distribution

Tuned by [tiltlm](https://pypi.org/project/tiltlm/). The licence of the base model applies to these weights.

| feature | kind | goal | base | tuned |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

KL(p‖π) is {_estimate(evaluation["kl_p_pi"])} (base: {_estimate(target["kl_p_a"])}) and KL(π‖a) is
{_estimate(evaluation["kl_pi_a"])}, in nats per text, measured on {evaluation["samples"]:,} fresh samples{where}.
p is the target, π the tuned model, a the base. Means and divergences are ± one standard error.

{kept}```yaml
{yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).strip()}
```
"""


def _estimate(entry: Mapping[str, float | None] | None) -> str:
    """An estimate of a record; "unknown" where it is not finite."""
    if entry is None or entry["value"] is None:
        return "unknown"
    return f"{entry['value']:.4g}" + ("" if entry["se"] is None else f" ± {entry['se']:.2g}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
