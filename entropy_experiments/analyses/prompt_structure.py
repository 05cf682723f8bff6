"""Do sequences of the same prompt move each other more than sequences of different prompts?

    difference  d = mean of K over same-prompt pairs - mean over cross-prompt pairs             i != j throughout
    contrast    c = sum_p f_p (alike_p - unlike_p) / sum_p f_p,     f_p = a_p u_p / (a_p + u_p)
    p           = min(1, 2 min(p_up, p_down)),      p_up = (1 + #{null >= observed}) / (1 + permutations), p_down likewise

K is K1 (raw) or its cosine. Of prompt p's pairs of a correct or wrong sequence with another, a_p are alike (both correct or
both wrong) with the mean alike_p, u_p are unlike; c compares within prompts only.

Equal sequences are one unit with the number of its copies as its weight, and their pairs count nowhere
(analyses/distinct_sequences.py). Null distributions: d between training sequences, gradients permuted over the places (prompt,
copies) of distinct sequences; c, gradients permuted within each prompt over the places (correctness, copies); d between the
buffers, *whole* prompts of the training buffer permuted, because its sequences are not independent given their prompt. What
stays in its place may depend on each other in any way; the tests are exact where gradients do not depend on it.

    one batch in both roles  V = sum_ij T(j, i),   T(j, i) = f w_i K_H(j, i) / n  =  self + same prompt + other prompts
    U-statistic over prompts U = B/(B-1) * other prompts,         bias of the single batch = V - U

f the step factor, n sequences of B prompts. Source: docs/analyses/prompt-structure.md, docs/theory/double-sampling.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from entropy_core.uncertainty import jackknife_standard_error
from entropy_experiments.analyses.arrays import KernelArrays
from entropy_experiments.analyses.distinct_sequences import (
    DistinctSequences,
    distinct_sequences,
    equal_across,
)
from entropy_experiments.analyses.kernel_geometry import check_finite, checked_gram, cosine_kernel
from entropy_experiments.records.estimates import Mean
from entropy_experiments.records.kernel_results import (
    BufferPairs,
    CorrectnessPairs,
    EvaluationStructure,
    GroupStructure,
    PairBlock,
    PairSum,
    PermutationTest,
    PromptStructureResult,
    SingleBatch,
    TrainingPairs,
    TrainingStructure,
)

_CORRECTNESS = {"correct": 1, "wrong": -1, "neither": 0}
CORRECTNESS_RULE = (
    "correct: reward above the mean reward of the sequence's prompt; wrong: below it; neither: equal to it, or unscored"
)
_BLOCK = 2_000_000
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def kernel_structure(kernel: np.ndarray, eval_prompts: np.ndarray, train_prompts: np.ndarray) -> dict[str, Any]:
    """Summary of a (n_eval, n_train) kernel with prompt labels on both axes.

    same_prompt_mean is None where the two buffers share no prompt, cross_prompt_mean where they share the only one.
    """
    same = np.asarray(eval_prompts)[:, None] == np.asarray(train_prompts)[None, :]
    values = np.asarray(kernel, dtype=np.float64)
    return {
        "n_eval": int(values.shape[0]),
        "n_train": int(values.shape[1]),
        "mean": float(values.mean()),
        "mean_abs": float(np.abs(values).mean()),
        "same_prompt_pairs": int(same.sum()),
        "same_prompt_mean": float(values[same].mean()) if same.any() else None,
        "cross_prompt_mean": float(values[~same].mean()) if (~same).any() else None,
    }


def prompt_structure(kernels: KernelArrays, *, permutations: int = 1999, seed: int = 0) -> PromptStructureResult:
    """The whole analysis. What cannot be computed is None, with a reason beside it.

    Args:
        kernels: K1 between the buffers and of the training buffer, in nats^2 x P, and KH of the training buffer.
        permutations: of each test.
        seed: of the permutations.

    Returns:
        The record that summary.json holds. Pairs of equal sequences are in no block.

    Raises:
        ValueError: a kernel that is not finite, or a train_fisher that is not symmetric.
    """
    gram = checked_gram(kernels.train_fisher)
    check_finite(np.asarray(kernels.fisher), "fisher")
    check_finite(np.asarray(kernels.train_entropy_fisher), "train_entropy_fisher")
    training, distinct = kernels.training, distinct_sequences(kernels.training, gram)
    correct = agreeing(correctness(training.reward, training.prompt_index), distinct)
    cosine, kept = cosine_kernel(gram)
    among_kept = distinct.among(kept)
    rng = np.random.default_rng(seed)  # the tests draw from it one after the other, in this order
    train = [_train_blocks(gram, distinct, permutations, rng), _train_blocks(cosine, among_kept, permutations, rng)]
    buffers = _buffer_blocks(kernels, gram, permutations, rng)
    groups = [
        _within_group(gram, distinct, correct, permutations, rng),
        _within_group(cosine, among_kept, correct[kept], permutations, rng),
    ]
    return PromptStructureResult(
        n_train=len(gram),
        n_prompts=len(np.unique(distinct.prompts)),
        without_gradient=len(gram) - len(kept),
        duplicates=distinct.counts(),
        permutations=permutations,
        seed=seed,
        train=TrainingStructure(raw=train[0], cosine=train[1], signs_agree=_signs_agree(train[0].test, train[1].test)),
        evaluation=EvaluationStructure(
            raw=buffers,
            cosine=None,
            cosine_reason="the lengths K1(t, t) of the evaluation sequences' gradients are not computed",
        ),
        within_group=GroupStructure(
            rule=CORRECTNESS_RULE,
            **{name: int((np.sign(correct) == sign).sum()) for name, sign in _CORRECTNESS.items()},
            raw=groups[0],
            cosine=groups[1],
            signs_agree=_signs_agree(groups[0].test, groups[1].test),
        ),
        single_batch=single_batch_estimate(kernels),
    )


def correctness(reward: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """(n,) +1 correct, -1 wrong, 0 neither, by CORRECTNESS_RULE; NaN rewards are neither and count in no mean."""
    rewards = np.asarray(reward, dtype=np.float64)
    signs = np.zeros(len(rewards), dtype=np.int64)
    for prompt in np.unique(prompts):
        scored = np.flatnonzero((np.asarray(prompts) == prompt) & np.isfinite(rewards))
        if len(scored):
            centred = rewards[scored] - rewards[scored].mean()
            equal = np.abs(centred) <= 1e-9 * np.abs(rewards[scored]).max()  # a mean of equal numbers is rounded
            signs[scored] = np.where(equal, 0, np.sign(centred))
    return signs


def agreeing(signs: np.ndarray, distinct: DistinctSequences) -> np.ndarray:
    """(n,) signs, 0 where copies of one sequence have different ones (its reward is not a function of its text)."""
    low, high = (np.full(len(distinct.first), value) for value in (1, -1))
    np.minimum.at(low, distinct.of, signs)
    np.maximum.at(high, distinct.of, signs)
    return np.where(low == high, low, 0)[distinct.of]


def single_batch_estimate(kernels: KernelArrays) -> SingleBatch:
    """What the training batch would predict of its own step's batch part, nats per token, and where that comes from.

    Standard errors are jackknives over prompts, None below three of them.
    """
    prompts, group = np.unique(kernels.training.prompt_index, return_inverse=True)
    count, n = len(prompts), len(group)
    terms = kernels.step_factor * np.asarray(kernels.train_entropy_fisher, np.float64) * kernels.weights[None, :] / n
    same = group[:, None] == group[None, :]
    itself = np.eye(n, dtype=bool)

    def part(pairs: np.ndarray) -> PairSum:
        return PairSum(value=float(terms[pairs].sum()), pairs=int(pairs.sum()))

    value = float(terms.sum())
    effective_weights = kernels.step_factor * np.asarray(kernels.weights, np.float64)
    u = bias = u_error = bias_error = None
    reason = "the U-statistic needs at least two prompts" if count < 2 else None
    if count >= 2:
        belongs = (group[None, :] == np.arange(count)[:, None]).astype(np.float64)
        products = count**2 * belongs @ terms @ belongs.T  # X_p . Y_q, normalised so that V = Xbar . Ybar
        u = u_statistic_of_products(products)
        bias = value - u
        if count == 2:
            reason = "a standard error of the U-statistic needs at least three prompts"
        else:
            others = [np.delete(np.delete(products, p, 0), p, 1) for p in range(count)]
            left_out = torch.tensor([u_statistic_of_products(rest) for rest in others], dtype=torch.float64)
            biases = torch.tensor([float(rest.mean()) for rest in others], dtype=torch.float64) - left_out
            u_error, bias_error = jackknife_standard_error(left_out), jackknife_standard_error(biases)
    return SingleBatch(
        self=part(itself),
        same_prompt=part(same & ~itself),
        cross_prompt=part(~same),
        value=value,
        evaluation_value=float(np.asarray(kernels.entropy_fisher, np.float64).mean(0) @ effective_weights),
        u_statistic=Mean(value=u, standard_error=u_error),
        bias=Mean(value=bias, standard_error=bias_error),
        reason=reason,
    )


def u_statistic_of_products(products: np.ndarray) -> float:
    """`entropy_core.u_statistic` from the (B, B) inner products X_p . Y_q alone: their mean over p != q. B at least 2."""
    count = len(products)
    return float(products[~np.eye(count, dtype=bool)].sum() / (count * (count - 1)))


def permutation_test(observed: float, null: np.ndarray, scale: float) -> PermutationTest:
    """`observed` against its permutation distribution; two-sided, add-one.

    Differences within 1e-9 of `scale` (the largest summand) are ties: the same rearrangement summed in another order.
    """
    tolerance = 1e-9 * scale
    up = (1 + int((null >= observed - tolerance).sum())) / (1 + len(null))
    down = (1 + int((null <= observed + tolerance).sum())) / (1 + len(null))
    deviation = float(null.std())
    return PermutationTest(
        difference=observed,
        p_value=min(1.0, 2 * min(up, down)),
        null_mean=float(null.mean()),
        null_deviation=deviation if deviation > tolerance else 0.0,
        null_low=float(np.quantile(null, 0.025)),
        null_high=float(np.quantile(null, 0.975)),
        reason=None,
    )


def shuffling_within(prompts: np.ndarray, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """A function that returns its (n,) argument with the values of each prompt in random order among themselves."""
    group = np.unique(prompts, return_inverse=True)[1]
    place = np.argsort(group, kind="stable")
    in_order = group[place].astype(np.float64)

    def shuffle(values: np.ndarray) -> np.ndarray:
        shuffled = np.empty_like(values)
        # Sorted by prompt, then at random: every prompt's values return to its own places.
        shuffled[place] = values[place[np.argsort(in_order + rng.random(len(place)))]]
        return shuffled

    return shuffle


def _no_test(reason: str) -> PermutationTest:
    names = ("difference", "p_value", "null_mean", "null_deviation", "null_low", "null_high")
    return PermutationTest(**dict.fromkeys(names), reason=reason)


def _block(values: np.ndarray) -> PairBlock:
    if not values.size:
        return PairBlock(pairs=0, mean=None, quantiles=None)
    quantiles = np.quantile(values, _QUANTILES).tolist()
    return PairBlock(pairs=int(values.size), mean=float(values.mean()), quantiles=quantiles)


def _pairs(distinct: DistinctSequences, kernel: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of pairs a < b of distinct sequences: a, b, K(a, b) and m_a m_b; K of (m, m) is the last, rows in the order of `first`."""
    small = kernel[np.ix_(distinct.first, distinct.first)]
    a, b = np.triu_indices(len(small), 1)
    return a, b, small[a, b], (distinct.copies[a] * distinct.copies[b]), small


def _train_blocks(
    kernel: np.ndarray, distinct: DistinctSequences, permutations: int, rng: np.random.Generator
) -> TrainingPairs:
    first, second, values, weights, small = _pairs(distinct, kernel)
    prompts = distinct.prompts[distinct.first]
    same = prompts[first] == prompts[second]
    blocks = {
        "self": _block(np.diag(kernel)),
        "same_prompt": _block(np.repeat(values[same], weights[same])),
        "cross_prompt": _block(np.repeat(values[~same], weights[~same])),
    }
    if len(prompts) < 2:
        return TrainingPairs(**blocks, test=_no_test("fewer than two distinct training sequences have a gradient"))
    if not same.any():
        return TrainingPairs(
            **blocks, test=_no_test("no prompt has two distinct sequences: there are no same-prompt pairs")
        )
    if same.all():
        return TrainingPairs(**blocks, test=_no_test("one prompt only: there are no cross-prompt pairs"))
    inside, outside = int(weights[same].sum()), int(weights[~same].sum())
    copies, squares = distinct.copies.astype(np.float64), np.diag(small)
    first, second, pair_weights = first[same], second[same], weights[same].astype(np.float64)
    null = []
    for orders in _orders(lambda: rng.permutation(len(prompts)), permutations, len(first)):
        moved = np.empty(orders.shape)
        np.put_along_axis(moved, orders, copies[None], 1)  # the weight that each gradient has at its new place
        total = ((moved @ small * moved).sum(1) - np.square(moved) @ squares) / 2
        together = small[orders[:, first], orders[:, second]] @ pair_weights
        null.append(together / inside - (total - together) / outside)
    observed = float(weights[same] @ values[same] / inside - weights[~same] @ values[~same] / outside)
    return TrainingPairs(**blocks, test=permutation_test(observed, np.concatenate(null), np.abs(values).max()))


def _orders(draw: Callable[[], np.ndarray], permutations: int, width: int) -> Iterator[np.ndarray]:
    """(R, n) orders in blocks, R times `width` bounded. One at a time, products as small as these wait for their threads."""
    size = max(1, _BLOCK // max(1, width))
    for start in range(0, permutations, size):
        yield np.stack([draw() for _ in range(min(size, permutations - start))])


def _buffer_blocks(kernels: KernelArrays, gram: np.ndarray, permutations: int, rng: np.random.Generator) -> BufferPairs:
    values = np.asarray(kernels.fisher, dtype=np.float64)
    eval_prompts, train_prompts = (np.asarray(side.prompt_index) for side in (kernels.evaluation, kernels.training))
    # Leaving out single pairs would make matched blocks smaller than permuted ones, and p-values too small.
    apart = ~equal_across(kernels.evaluation, kernels.training, values, gram).any(1)
    values, eval_prompts = values[apart], eval_prompts[apart]
    same = eval_prompts[:, None] == train_prompts[None, :]
    blocks = {
        "same_prompt": _block(values[same]),
        "cross_prompt": _block(values[~same]),
        "equal_to_training": int((~apart).sum()),
    }
    if not same.any():
        beside = "" if apart.all() else ", but for sequences that are equal in both"
        return BufferPairs(**blocks, test=_no_test(f"the two buffers share no prompt{beside}"))
    if same.all():
        return BufferPairs(**blocks, test=_no_test("one prompt only: there are no cross-prompt pairs"))
    names = np.unique(train_prompts)
    if len(names) < 2:
        return BufferPairs(**blocks, test=_no_test("the training buffer has one prompt: nothing to permute"))
    rows = (eval_prompts[None, :] == names[:, None]).astype(np.float64)
    columns = (train_prompts[None, :] == names[:, None]).astype(np.float64)
    sums, pairs = rows @ values @ columns.T, rows.sum(1)[:, None] * columns.sum(1)[None, :]
    total, places = float(values.sum()), np.arange(len(names))
    null = np.empty(permutations)
    for k in range(permutations):
        order = rng.permutation(len(names))
        inside, number = sums[places, order].sum(), pairs[places, order].sum()
        null[k] = inside / number - (total - inside) / (values.size - number)
    observed = float(values[same].mean() - values[~same].mean())
    return BufferPairs(**blocks, test=permutation_test(observed, null, np.abs(values).max()))


def _within_group(
    kernel: np.ndarray, distinct: DistinctSequences, correct: np.ndarray, permutations: int, rng: np.random.Generator
) -> CorrectnessPairs:
    labelled = np.flatnonzero(correct)
    distinct, correct = distinct.among(labelled), correct[labelled]
    first, second, values, weights, small = _pairs(distinct, kernel[np.ix_(labelled, labelled)])
    prompts, correct = distinct.prompts[distinct.first], correct[distinct.first]
    same = prompts[first] == prompts[second]
    first, second, values, weights = first[same], second[same], values[same], weights[same]
    total = correct[first] + correct[second]
    blocks = {
        name: _block(np.repeat(values[total == kind], weights[total == kind]))
        for name, kind in (("correct_correct", 2), ("correct_wrong", 0), ("wrong_wrong", -2))
    }
    _, group = np.unique(prompts[first], return_inverse=True)
    number = np.bincount(group, weights=weights)
    alike = np.bincount(group, weights=weights * (total != 0))
    scale = float((alike * (number - alike) / number).sum()) if len(number) else 0.0
    if scale == 0:
        reason = "no prompt has a correct and a wrong completion and a third of either kind, all distinct"
        return CorrectnessPairs(**blocks, test=_no_test(reason))
    # The regression of K on "alike" with an intercept for every prompt, weighted by pairs.
    coefficients = weights * ((total != 0) - (alike / number)[group]) / scale
    shuffle, places = shuffling_within(prompts, rng), np.arange(len(prompts))
    orders = _orders(lambda: shuffle(places), permutations, len(first))
    null = np.concatenate([small[some[:, first], some[:, second]] @ coefficients for some in orders])
    observed = float(coefficients @ values)
    return CorrectnessPairs(**blocks, test=permutation_test(observed, null, np.abs(values).max()))


def _signs_agree(raw: PermutationTest, cosine: PermutationTest) -> bool | None:
    """Whether raw K1 and its cosine lie on the same side of their null means; None without a test of both."""
    above = [
        test.difference - test.null_mean
        for test in (raw, cosine)
        if test.difference is not None and test.null_mean is not None
    ]
    return above[0] * above[1] > 0 if len(above) == 2 else None
