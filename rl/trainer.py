"""TRL's GRPO trainer with fast rollouts from a quantised, adapted model, token credit and risk-averse advantages."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType, send_to_device
from torch.nn.functional import pad
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer

from ..adapters.dense import dense_weights
from ..adapters.layer import keep_float32
from .credit import TokenCredit, credited, credited_advantages, token_credit
from .errors import RlError
from .heads import HeadSplit, pool
from .labelled_head import score_labelled_only
from .mismatch import MAX, MEAN
from .probe import evaluating, read_rhythm
from .rhythm import Rhythm
from .risk import Risk, is_graded, risk_advantages, tail_fault, zero_groups
from .rollout_cache import cache_settings, recorded
from .shared_prompt import pack, refuse_leaks, shared_prefill

_STATE_FILE = "token_credit.pt"
_ROLLOUT_FILE = "rollouts_{}.pt"  # of one process


class DenseRolloutGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer`, unchanged but for the weights it samples with, and, where asked, for prompts computed once.

    The policy that samples and the one that learns are the same up to the rounding of one weight to bfloat16, see
    `krontune.adapters.dense_weights`. With vLLM, which holds its own weights, sampling is untouched.

    A checkpoint also holds what TRL forgets: the completions that are still to be learned from, where it falls between
    two samplings, and how often the prompts were shuffled. A run that is continued goes on as the unbroken one.

    Args:
        dense_rollouts: sample with dense weights.
        share_prompts: compute the prompt that the completions of a group share once, in sampling and in each gradient
            step, see `krontune.rl.shared_prompt`: the same results up to rounding. The gain is largest where a group
            stays in one batch, `gradient_accumulation_steps=1`.
        rollout_cache: sample with a smaller cache of keys and values, see `krontune.rl.rollout_cache`: "offloaded",
            "fp8", "int4", "int2", or None for the usual one. How probable the sampled tokens are with it and without is
            then compared on the first micro-batch of each sampling, and logged under TRL's names,
            `sampling/sampling_logp_difference/mean` and `/max`; give `MismatchGuard` a limit for it.
        All others: of `trl.GRPOTrainer`.

    Raises:
        RlError: `share_prompts` with a model in which completions on one line would see each other; a `rollout_cache`
            that model, device, vLLM or `share_prompts` cannot have.
    """

    def __init__(
        self,
        *args: Any,
        dense_rollouts: bool = True,
        share_prompts: bool = False,
        rollout_cache: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._prompts: Any = None
        super().__init__(*args, **kwargs)
        for scorer in (self.model, self.ref_model):
            if scorer is not None:
                score_labelled_only(self.accelerator.unwrap_model(scorer))
        policy = self.accelerator.unwrap_model(self.model)
        keep_float32(policy)  # before DDP takes what TRL has cast
        self.rollout_cache = rollout_cache
        if rollout_cache is not None:
            self._set_cache(rollout_cache, share_prompts)
        self.dense_rollouts = dense_rollouts and not self.use_vllm
        self.share_prompts = share_prompts
        if share_prompts:
            with evaluating(policy), self.accelerator.autocast():
                refuse_leaks(policy)

    def _set_cache(self, cache: str, share_prompts: bool) -> None:
        if self.use_vllm:
            raise RlError(f"rollout_cache {cache!r} is one of transformers', and vLLM has its own; leave one out")
        if share_prompts:
            raise RlError(f"share_prompts fills a cache of its own, which cannot be {cache!r}; leave one of them out")
        if self.is_fsdp_enabled or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise RlError(f"rollout_cache {cache!r} is compared with the whole policy, which FSDP and DeepSpeed cut up")
        policy = self.accelerator.unwrap_model(self.model)
        for key, value in cache_settings(cache, policy.config, self.accelerator.device).items():
            setattr(self.generation_config, key, value)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        policy = self.accelerator.unwrap_model(self.model)
        with (
            dense_weights(policy) if self.dense_rollouts else nullcontext(),
            shared_prefill(policy) if self.share_prompts and not self.use_vllm else nullcontext(),
            recorded(policy, self.temperature) if self.rollout_cache else nullcontext([]) as sampled,
        ):
            completion_ids, log_probs = super()._generate_single_turn(*args, **kwargs)
        if sampled:
            log_probs = [row[: len(ids)].tolist() for row, ids in zip(sampled[0], completion_ids, strict=True)]
        return completion_ids, log_probs

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.rollout_cache is not None:
            self._log_mismatch(batch)
        return batch

    @torch.no_grad()
    def _log_mismatch(self, batch: dict[str, Any]) -> None:
        """Of the first micro-batch: sampler and learner, at the same weights."""
        if "pixel_values" in batch:
            raise RlError("a rollout_cache is measured on text alone, and this batch has images; leave it out")
        some = slice(self.args.per_device_train_batch_size)
        prompt, completion = batch["prompt_ids"][some], batch["completion_ids"][some]
        attended = torch.cat([batch["prompt_mask"][some], batch["completion_mask"][some]], 1)
        policy: Any = self.accelerator.unwrap_model(self.model)
        with evaluating(policy):
            learner, *_ = self._get_per_token_logps_and_entropies(
                self.model, torch.cat([prompt, completion], 1), attended, completion.shape[1]
            )
        own = batch["completion_mask"] * batch.get("tool_mask", 1)  # (B, C)
        apart = (learner - batch["sampling_per_token_logps"][some]).abs()[own[some].bool()]
        local = [apart.mean(), apart.max()] if len(apart) else [apart.new_zeros(())] * 2
        every = cast(torch.Tensor, self.accelerator.gather(torch.stack(local)[None]))  # (processes, 2)
        metrics = self._metrics["train" if policy.training else "eval"]
        metrics[MEAN].append(every[:, 0].mean().item())
        metrics[MAX].append(every[:, 1].max().item())

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **others: Any,
    ) -> Any:
        plain = compute_aux_loss or any(value is not None for value in others.values())  # a router, or images
        if not self.share_prompts or plain:
            options = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **options, **others
            )
        log_probs, entropies = [], []
        size = batch_size or len(input_ids)
        for ids, attended in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            prompt, completion = slice(None, -logits_to_keep), slice(-logits_to_keep, None)
            packed = pack(
                ids[:, prompt], attended[:, prompt], ids[:, completion], attended[:, completion], self._policy_dtype
            )
            with self.accelerator.autocast():
                scored = model(
                    input_ids=packed.input_ids,
                    attention_mask=packed.mask,
                    position_ids=packed.position_ids,
                    shift_labels=packed.labels,
                    fused_lm_head=True,
                )
            log_probs.append(scored.log_probs[packed.line[:, None], packed.places])  # (B, C)
            entropies.append(scored.entropy[packed.line[:, None], packed.places] if compute_entropy else None)
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None

    @property
    def _policy_dtype(self) -> torch.dtype:
        return self.accelerator.unwrap_model(self.model).dtype

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._prompts = super()._get_train_sampler(*args, **kwargs)
        return self._prompts

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        sampled_every = cast(int, cast(GRPOConfig, self.args).steps_per_generation) * self.num_iterations
        state = {"step": self._step, "batches": self._buffered_inputs if self._step % sampled_every else None}
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)  # of another process, which may be first
        torch.save(state, folder / _ROLLOUT_FILE.format(self.accelerator.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / _ROLLOUT_FILE.format(self.accelerator.process_index)
        if path.exists():
            state = torch.load(path, weights_only=True, map_location="cpu")
            self._step = state["step"]
            self._buffered_inputs = send_to_device(state["batches"], self.accelerator.device)
        if self._prompts is not None and self._prompts.shuffle:  # each epoch's order is drawn from one stream
            for _ in range(int(self.state.epoch or 0)):
                torch.randperm(self._prompts.num_samples, generator=self._prompts.generator)


class TokenCreditGRPOTrainer(DenseRolloutGRPOTrainer):
    """GRPO whose advantages differ from token to token, by what the policy's own attention says about them.

    After TRL has sampled and scored a batch, one more forward over prompts and completions, up to the last layer read,
    gives WAAD and FAI; `token_credit` turns them into gamma (B, T), and the advantages become A_i gamma_it. Responses
    whose advantage is 0 or not of the sign that is credited are left out of it. Gamma is found once for a sampled
    batch, as in the paper, and used in all gradient steps on it. Evaluation is untouched.

    Args:
        credit: the rule; None for the defaults, `TokenCredit(strategy="off")` for none.
        risk: what to maximise instead of the mean reward; None for the mean. It takes the place of `scale_rewards`:
            advantages are then centred and not divided by a standard deviation.
        All others: of `DenseRolloutGRPOTrainer`.

    Logs, over all of the model's tokens, `credit/gamma_mean`, `credit/share` (with a gamma other than 1) and
    `credit/fai_share` (with an FAI that was read); `credit/responses` (those with any token of a gamma other than 1),
    `credit/head_turnover`, `credit/cosine` where `credit.cosine_every` asks for it, and `risk/zero_groups`. Where all
    responses are credited the mean of gamma is about 1.2, and the gradient's norm grows alike: `max_grad_norm` bites
    earlier and a `beta` counts for less.

    Raises:
        RlError: settings that would erase token credit without a word, or that it was not made for: sequence-level
            importance sampling, the loss `luspo`, FSDP, ZeRO-3, images; attention that the probe cannot read; risk
            with `normalize_then_sum`, with batches that are not whole bundles, or with a tail of one completion; a
            credit or risk that is none.
    """

    def __init__(self, *args: Any, credit: TokenCredit | None = None, risk: Risk | None = None, **kwargs: Any) -> None:
        if credit is not None and not isinstance(credit, TokenCredit):
            raise RlError(
                f"credit must be a TokenCredit, such as TokenCredit(strategy='coupled'), or None, got {credit!r}"
            )
        if risk is not None and not isinstance(risk, Risk):
            raise RlError(f"risk must be a Risk, such as Risk(weight=0.5, alpha=0.5), or None, got {risk!r}")
        super().__init__(*args, **kwargs)
        self.credit = credit or TokenCredit()
        self.risk = risk
        self.head_split = HeadSplit(
            self.credit.head_split, quantile=self.credit.head_quantile, refresh=self.credit.head_refresh
        )
        self._batches = 0  # sampled so far
        self._batch_rewards: torch.Tensor | None = None
        self._graded = False  # whether a reward other than 0 and 1 was seen
        if self.credit.strategy != "off":
            self._refuse_lost_credit()
        if risk is not None:
            self._refuse_risk(risk)

    @property
    def _policy(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _group(self) -> int:
        """Completions a prompt."""
        return cast(int, self.num_generations)

    def _refuse_lost_credit(self) -> None:
        if self.importance_sampling_level == "sequence" or self.loss_type == "luspo":
            raise RlError(
                f"importance_sampling_level={self.importance_sampling_level!r} with loss_type={self.loss_type!r} "
                "weighs whole sequences, so that only the sum of a response's advantages would count and token credit "
                'be erased: set importance_sampling_level="token" and another loss, or TokenCredit(strategy="off")'
            )
        if self.is_fsdp_enabled or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise RlError("token credit reads a part of the model's forward, which FSDP and DeepSpeed do not allow")
        if self.top_entropy_quantile < 1:
            warnings.warn(
                f"top_entropy_quantile={self.top_entropy_quantile} drops the loss of low-entropy tokens, credited ones "
                "among them",
                stacklevel=3,
            )
        if self.credit.reads_attention:  # refuses what cannot be read before anything is sampled
            two = torch.ones(1, 2, dtype=torch.long, device=self.accelerator.device)
            read_rhythm(self._policy, two, two, two, self.credit.layers)

    def _refuse_risk(self, risk: Risk) -> None:
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise RlError(
                f"risk needs one reward a completion, got multi_objective_aggregation="
                f"{self.multi_objective_aggregation!r}: set it to 'sum_then_normalize'"
            )
        prompts = cast(int, cast(GRPOConfig, self.args).generation_batch_size) // self._group
        if prompts % risk.bundle:
            raise RlError(
                f"a batch of {prompts} prompts cannot be cut into bundles of {risk.bundle}: give a divisor of "
                f"{prompts}, or a larger batch"
            )
        if fault := tail_fault(self._group, risk):
            raise RlError(fault)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if not self._policy.training:
            return batch
        if self.risk is not None:
            batch["advantages"] = self._averse_advantages(self.risk, len(batch["advantages"]))
        if self.credit.strategy != "off":
            gamma = self._gamma(batch)
            plain = batch["advantages"]
            batch["advantages"] = credited_advantages(plain, gamma, self.credit.sign)
            if self.credit.cosine_every and self._batches % self.credit.cosine_every == 0:
                self._log_cosine(batch, plain)
        self._batches += 1
        return batch

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)  # (N, functions), of all processes
        unscored = rewards.isnan().all(1)
        self._batch_rewards = (
            (rewards * self.reward_weights.to(rewards.device)).nansum(1).masked_fill(unscored, torch.nan)
        )
        return rewards

    def _averse_advantages(self, risk: Risk, local: int) -> torch.Tensor:
        """This process's advantages (local,); the completions table shows them in the place of TRL's."""
        assert self._batch_rewards is not None
        self._graded = self._graded or is_graded(self._batch_rewards)
        if self._graded:  # a batch of zeros and ones alone is chance then, and no reason to end a run
            risk = replace(risk, allow_binary=True)
        advantages = risk_advantages(self._batch_rewards, self._group, risk)
        self._metrics["train"]["risk/zero_groups"].append(zero_groups(advantages, self._group))
        shown = self._logs["advantages"]
        for _ in range(min(len(shown), len(advantages))):
            shown.pop()
        shown.extend(advantages.tolist())
        return advantages[self.accelerator.process_index * local :][:local]

    @torch.no_grad()
    def _gamma(self, batch: dict[str, Any]) -> torch.Tensor:
        """Gamma (B, C) of the completions of a sampled batch, logged; 1 where it would change nothing."""
        if "pixel_values" in batch:
            raise RlError("token credit reads text alone, and this batch has images: use TokenCredit(strategy='off')")
        credit, completion = self.credit, batch["completion_ids"]
        own = batch["completion_mask"] * batch.get("tool_mask", 1)  # (B, C)
        response = own * credited(batch["advantages"], credit.sign)[:, None]
        if not credit.credit_truncated:
            response = response * self._finished(completion, batch["completion_mask"])[:, None]
        waad = fai = torch.zeros_like(response, dtype=torch.float32)
        if credit.reads_attention:
            waad, fai = self._waad_and_fai(batch, response)
        entropy = None
        if credit.strategy == "entropy":
            entropy = torch.zeros_like(waad)
            for at in response.any(1).nonzero().flatten().tolist():
                entropy[at] = self._log_probs_and_entropy(next(_rows(batch, [at])))[1][0]
        gamma = token_credit(
            waad,
            fai,
            response,
            credit,
            entropy=entropy,
            excluded=torch.isin(completion, torch.tensor(credit.exclude_ids, device=completion.device)),
            generator=self._generator(),
        )
        self._log_gamma(gamma, fai, own)
        return gamma

    def _waad_and_fai(self, batch: dict[str, Any], response: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C) each, over the local and the global heads; 0 for rows without response, which are not read.

        Read in chunks as long as a gradient step's batch, the longest rows together, each cut after its last response
        token: later ones are seen by nobody.
        """
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        counted = torch.cat([torch.zeros_like(batch["prompt_mask"]), response], 1)
        ends = (counted * torch.arange(1, ids.shape[1] + 1, device=ids.device)).amax(1)  # (B,), 0 without response
        order = ends.argsort(descending=True, stable=True)
        # At least one, since every process takes part in the split of heads.
        order = order[: max(int((ends > 0).sum()), 1)]
        credit, settled = self.credit, self.head_split.settled
        options = {"window": credit.window, "horizon": credit.horizon, "backend": credit.backend, "heads": settled}
        parts = []
        for some in order.split(self.args.per_device_train_batch_size):
            end = max(int(ends[some[0]]), 1)
            masks = ids[some, :end], attended[some, :end], counted[some, :end]
            with self.accelerator.autocast():
                rhythms = read_rhythm(self._policy, *masks, credit.layers, **options)
            parts.append({layer: _padded(rhythm, ids.shape[1]) for layer, rhythm in rhythms.items()})
        rhythms = {layer: _joined([part[layer] for part in parts]) for layer in parts[0]}
        heads = self.head_split.update(rhythms, counted[order])
        self._metrics["train"]["credit/head_turnover"].append(self.head_split.turnover)
        prompt, whole = batch["prompt_ids"].shape[1], torch.zeros(2, *ids.shape, device=ids.device)
        for which, values in enumerate(pool(rhythms, heads)):
            whole[which, order] = values.to(ids.device) * counted[order].any(1)[:, None]
        return whole[0, :, prompt:], whole[1, :, prompt:]

    def _finished(self, completion: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
        """(B,) whether a completion's last token ends it, rather than the length limit. Padding does, as for TRL: it
        follows where a stop string ended the generation."""
        last = completion.gather(1, (completion_mask.sum(1, keepdim=True) - 1).clamp(min=0))
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=last.device)
        return torch.isin(last, ends)[:, 0]

    def _generator(self) -> torch.Generator:
        """Chance of its own for each batch and process, and the same again where a run is continued."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return torch.Generator().manual_seed(self.credit.seed * 1_000_003 + self._batches * world + rank)

    def _log_gamma(self, gamma: torch.Tensor, fai: torch.Tensor, mask: torch.Tensor) -> None:
        """Means over the tokens and responses of all processes."""
        other = (gamma != 1) & mask.bool()
        seen = (fai > 0) & mask.bool()
        sums = [gamma.where(mask.bool(), 0).sum(), other.sum(), seen.sum(), mask.sum(), other.any(1).sum(), len(mask)]
        local = torch.tensor([float(some) for some in sums], device=gamma.device)
        reduced = cast(torch.Tensor, self.accelerator.reduce(local, "sum"))
        total, others, judged, tokens, credited, responses = reduced.tolist()
        metrics = self._metrics["train"]
        metrics["credit/gamma_mean"].append(total / max(tokens, 1))
        metrics["credit/share"].append(others / max(tokens, 1))
        metrics["credit/responses"].append(credited / responses)
        if self.credit.reads_attention:
            metrics["credit/fai_share"].append(judged / max(tokens, 1))

    def _log_cosine(self, batch: dict[str, Any], plain: torch.Tensor) -> None:
        """Cosine of the credited to the uncredited policy gradient, over the first rows of the batch.

        Of sum_t A_t grad log pi_t / |response|, the gradient of the first step on a batch, without clipping or KL.
        """
        parameters = [p for p in self._policy.parameters() if p.requires_grad]
        gradients: list[list[torch.Tensor]] = []
        rows = range(min(self.args.per_device_train_batch_size, len(plain)))
        for number, row in zip(rows, _rows(batch, rows), strict=True):
            log_probs, _ = self._log_probs_and_entropy(row)  # (1, C)
            mask = row["completion_mask"] * row.get("tool_mask", 1)
            if not mask.any():
                continue
            for which, advantages in enumerate((row["advantages"], plain[number].expand_as(row["advantages"]))):
                value = (log_probs * advantages * mask).sum() / mask.sum()
                parts = torch.autograd.grad(value, parameters, retain_graph=which == 0, allow_unused=True)
                found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)]
                if len(gradients) <= which:
                    gradients.append(found)
                else:
                    torch._foreach_add_(gradients[which], found)
        if not gradients:
            return
        both, first, second = (
            sum((a.double() * b.double()).sum().item() for a, b in zip(gradients[i], gradients[j], strict=True))
            for i, j in ((0, 1), (0, 0), (1, 1))
        )
        if first * second > 0:
            self._metrics["train"]["credit/cosine"].append(both / (first * second) ** 0.5)

    def _log_probs_and_entropy(self, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the policy at each completion token, at the sampling temperature: (B, C) each, the entropy in nats."""
        ids = torch.cat([row["prompt_ids"], row["completion_ids"]], 1)
        attended = torch.cat([row["prompt_mask"], row["completion_mask"]], 1)
        with evaluating(self._policy):
            log_probs, entropy, _ = self._get_per_token_logps_and_entropies(
                self._policy, ids, attended, row["completion_ids"].shape[1], compute_entropy=True
            )
        return log_probs, entropy.detach()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            state = {"batches": self._batches, "heads": self.head_split.state_dict(), "graded": self._graded}
            torch.save(state, folder / _STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / _STATE_FILE).exists():
            state = torch.load(path, weights_only=True)
            self._batches, self._graded = state["batches"], state.get("graded", False)
            self.head_split.load_state_dict(state["heads"])


def _rows(batch: dict[str, Any], places: Sequence[int]) -> Iterator[dict[str, Any]]:
    """These rows of the batch one by one, each still with its first dimension."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "advantages")
    for at in places:
        yield {name: batch[name][at : at + 1] for name in names if name in batch}


def _padded(rhythm: Rhythm, length: int) -> Rhythm:
    """The same with zeros up to `length` tokens."""
    waad, fai, rows = (pad(x, (0, length - x.shape[-1])) for x in (rhythm.waad, rhythm.fai, rhythm.rows))
    return Rhythm(waad, fai, rhythm.span, rows)


def _joined(parts: list[Rhythm]) -> Rhythm:
    """One rhythm of the rows of several."""
    spans = [part.span for part in parts if part.span is not None]
    waad, fai, rows = (torch.cat([getattr(part, name) for part in parts]) for name in ("waad", "fai", "rows"))
    return Rhythm(waad, fai, torch.cat(spans) if spans else None, rows)
