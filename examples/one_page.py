"""GDC++ on one page, with tiltlm's parts and nothing hidden: half of the sentences about women.

    python examples/one_page.py

The trainer does the same with chunks, checkpoints and diagnostics. Arguments: steps, batch size, samples for the fit.
"""

import sys

import torch

import tiltlm
from tiltlm.features import pronouns
from tiltlm.lm import Roles
from tiltlm.targets.base_sample import measure_samples


def main(steps: int = 40, batch_size: int = 256, fit_samples: int = 4096) -> None:
    base = tiltlm.LanguageModel.from_pretrained("embedded")
    target = tiltlm.constrain(base, {pronouns("female"): 0.5}, samples=fit_samples)
    log_z = target.report.log_z.value
    roles = Roles(base.copy(), base=base)
    policy = roles.policy
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(1)

    for step in range(1, steps + 1):
        samples = policy.sample(batch_size, generator=generator)  # x ~ q = π
        features = measure_samples(target.features, samples)  # φ(x)
        with torch.no_grad():
            base_logprob = base.logprob(samples).sum(-1)  # log a(x)
        log_p = target.log_score(base_logprob, features) - log_z  # log P(x)/Z
        log_pi = policy.logprob(samples).sum(-1)  # log π(x), with its gradient

        log_q = samples.sequence_logprob
        coefficient = (log_p - log_q).exp() - (log_pi.detach() - log_q).exp()  # P/(Z q) − π/q
        loss = -(coefficient * log_pi).mean()

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        share = features[:, 0].mean().item()
        print(f"step {step:3d}  female {share:.3f}  KL(p‖π) {((log_p - log_q).exp() * (log_p - log_pi)).mean():.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
