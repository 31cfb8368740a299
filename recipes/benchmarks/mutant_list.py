"""The mutants that `mutants.py` runs: by file, the tests that should notice, and what is put where something stands.

A text must occur exactly once in its file; where code changes, change its mutants with it (`mutants.py --check`).
"""

Changes = list[tuple[str, str]]
Reasoned = list[tuple[str, str, str]]

_TOKENS = ("tests/sensitivity/test_tokens.py",)
_FISHER = ("tests/sensitivity/test_adapter.py",)
_OBJECTIVE = ("tests/sensitivity/test_objective.py",)
_LOSS = ("tests/sensitivity/test_cross_entropy.py",)
_OPTIONS = ("tests/recipe/test_method_switches.py", "tests/recipe/test_refinement_settings.py")
_SELECTION = ("tests/generation/test_selection.py",)
_SERVER = ("tests/federation/server/test_server_optimizers.py", "tests/federation/server/test_aggregation.py")
_UPDATE = ("tests/codec/test_update.py",)
_MESSAGE = ("tests/codec/test_message.py", "tests/codec/test_format.py", "tests/attacks/test_container.py")
_SCALE = ("tests/trainer/test_sensitivity_scale.py",)
_DOWNLINK = ("tests/federation/client/test_downlink.py",)
_SESSION = (
    "tests/federation/client/test_session.py",
    "tests/federation/client/test_session_sizes.py",
    "tests/federation/test_budget_share.py",
)
_VARIATES = ("tests/federation/test_scaffold.py",)
_SCREENING = ("tests/federation/server/test_screening.py", "tests/attacks/client/test_client_attachments.py")
_CLIPPING = ("tests/attacks/client/test_client_clipping.py", "tests/federation/server/test_collecting.py")
_COLLECTING = (
    "tests/federation/server/test_collecting.py",
    "tests/federation/test_weights.py",
    "tests/attacks/client/test_client_changing.py",
    "tests/attacks/client/test_client_clipping.py",
)

MUTANTS: list[tuple[str, tuple[str, ...], Changes]] = [
    (
        "sensitivity/fisher.py",
        _TOKENS,
        [
            ("self.rho * self._ema[seen] + (1.0 - self.rho) * mean", "self.rho * self._ema[seen] + mean"),
            ("index_add_(0, place, values) / occurrences", "index_add_(0, place, values)"),
            ("self._count[seen] += 1", "self._count[seen] += occurrences"),
            ("self._ema[ids] / (1.0 - self.rho ** count.double())", "self._ema[ids]"),
            ("torch.where(count > 0, corrected, torch.inf)", "torch.where(count > 1, corrected, torch.inf)"),
            ("torch.where(count > 0, corrected, torch.inf)", "torch.where(count > 0, corrected, 0.0)"),
            ("torch.argsort(scores, descending=True, stable=True)", "torch.argsort(scores, stable=True)"),
            ("order[: min(k, int((self._count > 0).sum()))]", "order[:k]"),
            ("int(ids.max()) >= self.vocab_size", "int(ids.max()) > self.vocab_size"),
            ("int(ids.min()) < 0 or", ""),
            ("ids, values = ids[keep], values[keep]", "pass"),
            ("if not bool(torch.isfinite(values).all())", "if bool(torch.isnan(values).any())"),
            ('{"ema": self._ema.clone(), "count"', '{"ema": self._ema, "count"'),
        ],
    ),
    (
        "sensitivity/fisher.py",
        _FISHER,
        [
            ("torch._foreach_mul_(self._ema, self.rho)", "pass"),
            ("given, given, value=1.0 - self.rho)", "given, given, value=self.rho)"),
            ("1.0 / (1.0 - self.rho**self._steps)", "1.0"),
            ("1.0 / (1.0 - self.rho**self._steps)", "1.0 / (1.0 - self.rho ** (self._steps + 1))"),
            ("self._steps += 1", "self._steps = 1"),
            ("            torch._foreach_zero_(self._ema)\n", "            pass\n"),
            (
                "            torch._foreach_zero_(self._ema)\n        self._steps = 0",
                "            torch._foreach_zero_(self._ema)",
            ),
            ("norms.float().square().sum()", "norms.float().sum()"),
            ("        check_finite(given)\n", ""),
            ("beta[1] ** float", "beta[0] ** float"),
            ('state["exp_avg_sq"].float().reshape(-1) / correction', 'state["exp_avg_sq"].float().reshape(-1)'),
            ("offset += target.numel()", "offset += 0"),
            ('self._steps = int(state["steps"])', "self._steps = 1"),
            ("(e, g.detach().float())", "(e, g.detach())"),
            ("not parameter.requires_grad or (beta", "(beta"),
        ],
    ),
    (
        "sensitivity/objective.py",
        _OBJECTIVE,
        [
            ("torch.rand(len(chance), dtype", "torch.rand(1, dtype"),
            ("weights[kept_ones] = 1.0 / chance[kept_ones]", "weights[kept_ones] = 1.0"),
            ("math.ceil(ratio * count - 1e-9)", "math.ceil(ratio * count)"),
            ("math.ceil(ratio * count - 1e-9)", "math.floor(ratio * count)"),
            ("[:kept]] = count / kept", "[:kept]] = 1.0"),
            ("torch.argsort(given, descending=True, stable=True)", "torch.argsort(given, stable=True)"),
            ("shares = _relative(given) ** gamma\n", "shares = _relative(given)\n"),
            ("weights[valid] = shares / shares.mean()", "weights[valid] = shares"),
            ("keep_probabilities(given, ratio, gamma)", "keep_probabilities(given, ratio)"),
            ("wanted, floor = ratio * len(scores), FLOOR * ratio", "wanted, floor = ratio * len(scores), 0.0"),
            (".clamp_min(_LEAST)", ""),
            ("(high * shares).clamp(floor, 1.0)", "(high * shares).clamp_min(floor)"),
            ("for _ in range(80)", "for _ in range(20)"),
            ("torch.where(seen, scores / largest, 1.0)", "torch.where(seen, scores / largest, 0.0)"),
            ("if largest == 0.0:", "if False:"),
            ("torch.floor(ends - marks) > torch.floor(starts - marks)", "torch.ceil(ends) > torch.ceil(starts)"),
            ("ends = chance.cumsum(dim=1)", "ends = chance.cumsum(dim=0)"),
        ],
    ),
    (
        "sensitivity/objective.py",
        _LOSS,
        [
            ("factors = gradient * weights", "factors = weights"),
            (".exp_().mul_(factors[rows, None])", ".exp_()"),
            ("chunk.scatter_add_(1, targets[rows, None], -factors[rows, None])", "pass"),
            ("return (weights * losses).sum(), losses", "return (weights * losses).mean(), losses"),
            ("torch.promote_types(logits.dtype, torch.float32)", "logits.dtype"),
            ("slice(start, start + rows) for start in range(0, len(logits), rows)", "slice(0, rows)"),
            ("return loss, losses.sum()", "return loss, loss.detach()"),
        ],
    ),
    (
        "methods.py",
        _OPTIONS,
        [
            ("row.range.check(name, getattr(self, name))", "pass"),
            ("if needed and needed not in on:", "if False:"),
            ("if other in on:", "if False:"),
            ("row.only is not None and value != row.only", "False"),
            ("return 0.0 if unbiased else 1.0", "return 1.0"),
            ("if unbiased and asked:", "if False:"),
        ],
    ),
    (
        "ranges.py",
        _OPTIONS,
        [
            ("(self.above and value == self.low)", "False"),
            ("(self.below and value == self.high)", "False"),
            ("if value not in self.names:", "if False:"),
        ],
    ),
    (
        "generation/selection.py",
        _SELECTION,
        [
            ("math.ceil(round(ratio * length, 6))", "math.ceil(ratio * length)"),
            ("math.ceil(round(ratio * length, 6))", "round(ratio * length)"),
            ("math.ceil(round(ratio * length, 6))", "math.ceil(round(ratio * length, 0))"),
            ("lengths.clamp_max(keep_tokens)", "lengths.clamp_min(keep_tokens)"),
            ("attention_mask.long().sum(-1)", "torch.tensor([attention_mask.shape[-1]] * len(attention_mask))"),
            ("needed = (protected | always).sum(-1)", "needed = protected.sum(-1)"),
            ("and need > have", "and need >= have"),
            ("bool(protected[row].any()) and", ""),
            ("(scores.isnan() & real).any()", "scores.isnan().any()"),
            ("protected = protected & real", "pass"),
            ("torch.maximum(budget, protected.sum(-1))", "budget"),
            (".clamp_max(real.sum(-1))", ""),
            ("positions = filled.sort(dim=-1).values", "positions = filled"),
            ("2 * kept.long() + (~real).long()", "2 * kept.long()"),
            ("scores.argsort(dim=-1, descending=True, stable=True)", "scores.argsort(dim=-1, stable=True)"),
        ],
    ),
    (
        "federation/aggregation.py",
        _SERVER,
        [
            ("update.add_to(self._sum, weight * scale)", "update.add_to(self._sum, weight)"),
            ("update.add_to(self._sum, weight * scale)", "update.add_to(self._sum, scale)"),
            ("self.total_weight += weight", "self.total_weight += weight * scale"),
            ("self._sum = torch.zeros(num_params, dtype=torch.float64)", "self._sum = torch.zeros(num_params)"),
            ("(self._sum / self.total_weight).to(torch.float32)", "self._sum.to(torch.float32)"),
            ("if self.total_weight == 0:", "if False:"),
            ("parameter.grad = -mean_update", "parameter.grad = mean_update"),
            ("parameter.detach() - adapter, save(tensors)", "parameter.detach(), save(tensors)"),
            ("torch.nn.Parameter(adapter.clone())", "torch.nn.Parameter(adapter)"),
            ("optimizer.state[parameter] = dict(restored)", "pass"),
            ('options["lr"] += progress * (final - options["lr"])', 'options["lr"] += progress * final'),
            ('options.setdefault("lr", 1.0)', 'options.setdefault("lr", 0.1)'),
            ("for progress in (0.0, 1.0):", "for progress in (0.0,):"),
            ("and value is not torch.optim.Optimizer", ""),
            ('"FedAdam": FedAdam, "SGD": SGD}', '"FedAdam": FedAdam}'),
        ],
    ),
    (
        "federation/aggregation.py",
        _SERVER,
        [
            ("gradient = -parameter.grad if group", "gradient = parameter.grad if group"),
            ("gradient = gradient + parameter * group", "gradient = gradient - parameter * group"),
            ('gradient * (1 - group["dampening"])', "gradient"),
            ('if group["nesterov"] else velocity', "if False else velocity"),
            (".add_(parameter.grad * (1 - first))", ".add_(parameter.grad, alpha=1 - first)"),
            ('root.add_(group["tau"])', "root"),
            ('torch.full_like(parameter, group["tau"] ** 2)', "torch.zeros_like(parameter)"),
            ("not 0 <= first < 1", "not 0 <= first <= 1"),
        ],
    ),
    (
        "codec/codec.py",
        _UPDATE,
        [
            ("part.double().square()", "part.square().double()"),
            ("dense[self.indices] = self.values", "dense[self.indices] += 1"),
            ("return self.values.clone()", "return self.values"),
        ],
    ),
    (
        "codec/message.py",
        _MESSAGE,
        [
            ("not 0 <= value <= _MAX_INT", "not 0 <= value"),
            ("type(value) is not int or not 0", "not isinstance(value, int) or not 0"),
            ("not pattern.fullmatch(value)", "not pattern.match(value)"),
            ("if isinstance(value, (int, float)) and not -_MAX_INT <= value <= _MAX_INT:", "if False:"),
            ("if sign is not None and len(signature) != SIGNATURE_BYTES:", "if False:"),
            ("(_NO_SIGNATURE if signed", '(b"" if signed'),
            ("len(data) > max_bytes:", "len(data) >= max_bytes:"),
            ("if is_sealed(data):", "if False:"),
            ("if len(data) < 8:", "if False:"),
            ("min(len(data), MAX_CONTAINER) - 8", "len(data) - 8"),
            ("min(len(data), MAX_CONTAINER) - 8", "MAX_CONTAINER - 8"),
            ("if _envelope(header, seal, len(payload)) != data[: 8 + length]:", "if False:"),
            ("seal[:32], seal[32:] or None", "seal[:32], None"),
            ("if _digest(header, payload) != digest:", "if False:"),
            ("if type(version) is not int or version != VERSION:", "if False:"),
            ("TypeError, IndexError, AttributeError, RecursionError", "TypeError, IndexError, AttributeError"),
            ("if len(raw) not in (96, 96 + SIGNATURE_BYTES):", "if len(raw) < 96:"),
            ("base, schema = raw[:32].hex(), raw[32:64].hex()", "base, schema = raw[32:64].hex(), raw[:32].hex()"),
            ("_canonical(_fields(header)) + hashes + payload", "_canonical(_fields(header)) + payload"),
            ("_canonical(_fields(header)) + hashes + payload", "hashes + payload"),
            ("sort_keys=True, allow_nan=False", "allow_nan=False"),
            ("if schema.fingerprint != header.schema:", "if False:"),
            ('if params.pop("payloads", 1) == 2:', 'if params.pop("payloads", 1) == 3:'),
            ("part[part != 0]", "part"),
        ],
    ),
    (
        "trainer/steps.py",
        _SCALE,
        [
            ("return num_items / (self._processes.count if", "return 1 / (self._processes.count if"),
            ("* (1 if scaled else steps)", ""),
            ("if num_items is not None and (filtered or scaled):", "if num_items is not None:"),
            ("self.filter.window_targets / self._processes.count", "self.filter.window_targets / steps"),
        ],
    ),
    (
        "trainer/gradient_hooks.py",
        _SCALE,
        [
            ("(gradient.detach().float() * divisor).square()", "gradient.detach().float().square() * divisor"),
        ],
    ),
    (
        "federation/client/session.py",
        _SESSION,
        [
            ("or round <= self.last_round", "or round < self.last_round"),
            ("self.pending is not None or round <= self.last_round", "round <= self.last_round"),
            ("not bool(tensor.isfinite().all())", "bool(tensor.isnan().any())"),
            ("pending is None or record.round <= pending.round", "pending is None or record.round < pending.round"),
            ("room = math.floor(room * self.spec.budget_share(num_examples))", "pass"),
            ("overhead += keys.SEAL_OVERHEAD if self.spec.sealing_key is not None else 0", "pass"),
            ("room = max(0, min(room, (cap", "room = max(0, max(room, (cap"),
            ("signed=self._sign is not None)", "signed=False)"),
            ("return pending.refinement is not None and not message", "return not message"),
            (
                "return pending.refinement is not None and not message",
                "return pending.refinement is None and not message",
            ),
            ("lock_descriptor(file.fileno(), blocking=False)", "True"),
            ("if schema.fingerprint != spec.schema:", "if False:"),
            ("float(torch.linalg.vector_norm(self.residual))", "float(self.residual.sum())"),
            ("room = (max_bytes - overhead) // (2 if self._has_variate else 1)", "room = max_bytes - overhead"),
            ("self.outbox.corrected(self.trained.take(delta))", "self.trained.take(delta)"),
            (
                "self.spec.method.refinement_budget is not None and not self.spec.refines(round)",
                "self.spec.method.refinement_budget is not None",
            ),
        ],
    ),
    (
        "federation/client/session.py",
        _VARIATES,
        [
            (
                "self.carried.items() if name == scaffold.CARRIED}\n        if variate",
                "self.carried.items() if False}\n        if variate",
            ),
            ("variate = variate - scaffold.client_variate(", "variate = variate + 0 * scaffold.client_variate("),
            (".add_to(variate, 1.0)", ".add_to(variate, 2.0)"),
        ],
    ),
    (
        "federation/server/screening.py",
        _SCREENING,
        [
            ("if not self.control.enrolled(ref.client_id):", "if False:"),
            ("if selected is not None and ref.client_id not in selected:", "if False:"),
            ("if ref.num_bytes > self.max_bytes:", "if ref.num_bytes > self.spec.max_message_bytes - 1:"),
            ("+ (keys.SEAL_OVERHEAD if self.spec.sealing_key else 0)", ""),
            ("if header.num_examples < 1:", "if header.num_examples < 0:"),
            ("if (header.params == message.REFINEMENT_PARAMS) != ref.refinement:", "if False:"),
            ("if not math.isfinite(norm) or (", "if ("),
            ("if not math.isfinite(norm) or (variate is not None", "if not math.isfinite(norm) or (False"),
            ("if self.spec.signatures:", "if False:"),
            ("if signature is None:", "if False:"),
            ("        keys.verify(key, self.spec.id, digest, signature)\n", ""),
            ("if header.params != PAIR_PARAMS:", "if False:"),
            ("if len(data) != ref.num_bytes:", "if False:"),
            ("if not pair and header.params not in ({}, message.REFINEMENT_PARAMS):", "if False:"),
            ("if len(opened.payload) > max_bytes:", "if False:"),
        ],
    ),
    (
        "federation/envelope.py",
        _SCREENING,
        [
            ('"client": (header.client_id, expected.client_id),', ""),
            ('"round": (header.round, expected.round),', ""),
            ('"base adapter": (header.base, expected.base),', ""),
            ('"schema": (header.schema, expected.schema),', ""),
            ('"codec": (header.codec, expected.codec),', ""),
            ("if message.is_sealed(data) != sealed:", "if sealed and not keys.is_sealed(data):"),
            ("if message.is_sealed(data) != sealed:", "if keys.is_sealed(data) and not sealed:"),
            ("if unseal is None:", "if False:"),
            ("verify is not None and verify(digest, signature)", "False"),
        ],
    ),
    (
        "federation/aggregation.py",
        _CLIPPING,
        [
            ("norm <= longest else longest / norm", "norm <= longest else norm / longest"),
            ("norm <= longest else longest / norm", "norm < 2 * longest else longest / norm"),
            ("if middle > 0:", "if True:"),
            ("statistics.median_low(norms)", "statistics.median_high(norms)"),
            ("(*norms, *known.lengths) if norm > 0", "norms if norm > 0"),
            ("(*norms, *known.lengths) if norm > 0", "(*norms, *known.lengths)"),
            ("min(clip * statistics.median_low(lengths), known.adapter)", "clip * statistics.median_low(lengths)"),
            ("if len(lengths) > 1 else 0.0", ""),
            ("if clip is None or not any(norms):", "if clip is None:"),
            ("update.scale * update.norm for", "update.norm for"),
        ],
    ),
    (
        "federation/envelope.py",
        _SESSION,
        [
            ("return readable if sealing_key is None else keys.seal(sealing_key, readable)", "return readable"),
        ],
    ),
    (
        "federation/client/outbox.py",
        _SESSION,
        [
            ("residual = self.feedback.after(self.pending.corrected, sent)", "residual = self.pending.corrected"),
            ("self.feedback.decay > 0 and bool(residual.any())", "bool(residual.any())"),
            ("return hashlib.sha256(self.message).hexdigest()", "return hashlib.sha256(self.readable).hexdigest()"),
        ],
    ),
    (
        "federation/server/collecting.py",
        _COLLECTING,
        [
            ("if hashlib.sha256(data).hexdigest() != sha256:", "if False:"),
            ("weight=entry.weight / total)", "weight=entry.weight)"),
            ("method.weight_cap * statistics.median_low(raw)", "method.weight_cap * max(raw)"),
            ("scale=clip_scale(entry.norm, longest)", "scale=1.0"),
            ("[entry.norm for entry in entries], method.clip", "[0.0 for entry in entries], method.clip"),
            ("known.tries >= _MOST_TRIES or known.stamp == _stamp(ref)", "known.tries >= _MOST_TRIES"),
            ("known.tries >= _MOST_TRIES or known.stamp == _stamp(ref)", "known.stamp == _stamp(ref)"),
            ("tries += 0 if known is None else known.tries", "pass"),
            ("> _MAX_NORM:", "< 0:"),
            ("num_bytes=len(data),", "num_bytes=ref.num_bytes + 1,"),
            ("weight *= method.staleness_discount**entry.staleness", "pass"),
            ("min(1.0, own / max(1, entry.num_examples))", "1.0"),
            ("weights.append(min(value * trusted, most))", "weights.append(value * trusted)"),
            ("staleness=self.round - ref.round", "staleness=0"),
            ("            self._refused.clear()\n", "            pass\n"),
            ('1 if basis == "uniform" else entry.num_examples', "entry.num_examples"),
            ("mean.add(opened.update, entry.weight, entry.scale)", "mean.add(opened.update, entry.weight, 1.0)"),
            ("None if self._is_refused(ref) else self._screen(", "self._screen("),
            ("        if control.clients != self._refused_by.clients:\n            return list(refs)\n", ""),
            ("precision_weights(weights, [entry.norm for entry in entries])", "weights"),
        ],
    ),
    (
        "federation/frames.py",
        _DOWNLINK,
        [
            ("    if header != expected:\n", "    if False:\n"),
            ("mean.add(update, weight, scale)", "mean.add(update, weight, 1.0)"),
            ("mean.add(update, weight, scale)", "mean.add(update, 1.0, scale)"),
            ("if position != len(payload) or not 0 < mean.total_weight < math.inf:", "if False:"),
            ("if len(payload) < position or not count:", "if False:"),
            ("(0 <= weight < math.inf and 0 <= scale <= 1)", "True"),
            ("schema.digest(vector) == record.adapter_digest", "True"),
            ('spec.name}".encode()', '0}".encode()'),
            ("elif not is_lora_b(spec.name) or", "elif"),
        ],
    ),
    (
        "federation/server/framing.py",
        _DOWNLINK,
        [
            ("else self.adapter + change + residual", "else self.adapter + change"),
            ("target - adapter, Frame", "target - start, Frame"),
            ("joining + len(data) <= most", "True"),
            ("size * (1 + last)", "size"),
            ("if hashlib.sha256(data).hexdigest() != record.residual_sha256:", "if False:"),
            ("of_a = b.reshape(-1, rank).square().sum(0)", "of_a = a.reshape(rank, -1).square().sum(1)"),
        ],
    ),
    (
        "federation/client/downlink.py",
        _DOWNLINK,
        [
            ("            if not self._is(adapter, record):\n", "            if False:\n"),
            ("return first.kind != KEYFRAME and first.round - 1 == held", "return first.round - 1 == held"),
            ("self._record(0).adapter_bytes if self._initial is None else 0", "0"),
        ],
    ),
]

EQUIVALENT: list[tuple[str, tuple[str, ...], Reasoned]] = [
    (
        "codec/message.py",
        _MESSAGE,
        [
            (
                '["fstq"]\n        if len(meta) > MAX_METADATA:',
                '["fstq"]\n        if False:',
                "what is longer is refused where the envelope is written again, and the header's cap bounds it before",
            ),
            (
                "if type(version) is not int or version != VERSION:",
                "if version != VERSION:",
                "true and 1.0 equal 1, and are not in canonical form",
            ),
        ],
    ),
]
