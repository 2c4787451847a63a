"""The model card beside a tuned model: what it was tuned toward, and how close it got."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from tiltlm.reports.summary import prompts_in_words

if TYPE_CHECKING:
    from tiltlm.evaluation.evaluate import Evaluation
    from tiltlm.targets import FitReport

# Whoever loads the weights alone has another law than the one that was measured.
KEPT_GUIDE = """These figures are of the weights **together with `guide.safetensors`**, which reweights each next token.
tiltlm loads it with them; in transformers pass it to every `generate`:

```python
from tiltlm.lm import Guide, GuideProcessor

guide = Guide.load("guide.safetensors")
model.generate(**inputs, logits_processor=[GuideProcessor(guide, prompt_length=inputs["input_ids"].shape[1])])
```

"""


def model_card(
    base: str, config: Mapping[str, Any], report: FitReport, evaluation: Evaluation, *, keeps_guide: bool
) -> str:
    """Markdown with the target, the figures and the configuration."""
    rows = []
    for term in report.terms:
        goal = "" if term.goal is None else f"{term.goal:g}"
        rows.append(f"| {_cell(term.name)} | {term.kind} | {goal} | {term.base} | {evaluation.moments[term.name]} |")
    asked = prompts_in_words({"prompts": evaluation.prompts, "prompts_from": evaluation.prompts_from})
    adapter = "peft" if config.get("peft") else "transformers"
    kept = KEPT_GUIDE if keeps_guide else ""
    return f"""---
library_name: {adapter}
tags: [tiltlm, distribution-matching]
---

# {_cell(base)}, tuned toward a stated distribution

Tuned by [tiltlm](https://pypi.org/project/tiltlm/). The licence of the base model applies to these weights.

| feature | kind | goal | base | tuned |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

KL(p‖π) {evaluation.kl_p_pi} (it was {report.kl_p_a} for the base), KL(π‖a) {evaluation.kl_pi_a}, both in nats per
sequence, on {evaluation.samples:,} fresh samples{f" on {asked}" if asked else ""}; each figure with its standard error.

{kept}```yaml
{yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).strip()}
```
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
