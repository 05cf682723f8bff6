"""Which sequences of a buffer are one and the same, drawn several times?

Equal (prompt, completion) pairs have equal gradients: a cosine of 1 that says nothing about the prompt, its correctness or any
cluster. Tests that permute or resample sequences need units that are exchangeable, so that each distinct sequence enters
once, with the number of its copies as its weight:

    mean over pairs = sum_{a<b} m_a m_b K(a, b) / sum_{a<b} m_a m_b          a, b distinct sequences, m_a copies of a

which is the mean over all pairs of drawn sequences but those of equal ones. Kernels and figures show every sequence.
Source: docs/analyses/prompt-structure.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entropy_experiments.analyses.arrays import SequenceLabels
from entropy_experiments.records.kernel_results import Duplicates

# |g_i - g_j|^2 of equal sequences, in parts of |g|^2: rounding of two float32 passes stays far below, other tokens far above.
_SAME_GRADIENT = 1e-3


@dataclass(frozen=True)
class DistinctSequences:
    """n sequences, m of them distinct. first: (m,) the first of each set of equal ones, ascending; of: (n,) place in `first` of
    every sequence; prompts: (n,) prompt labels, equal for equal texts.
    """

    first: np.ndarray
    of: np.ndarray
    prompts: np.ndarray

    @property
    def copies(self) -> np.ndarray:
        """(m,) how often each distinct sequence was drawn."""
        return np.bincount(self.of, minlength=len(self.first))

    @property
    def equal_pairs(self) -> int:
        """Pairs of sequences that are equal."""
        return int((self.copies * (self.copies - 1) // 2).sum())

    def among(self, rows: np.ndarray) -> DistinctSequences:
        """The same of (k,) some of the sequences, which are numbered 0 ... k - 1."""
        kept, of = np.unique(self.of[rows], return_inverse=True)
        first = np.array([np.flatnonzero(of == place)[0] for place in range(len(kept))], dtype=np.int64)
        order = np.argsort(first)
        return DistinctSequences(first[order], np.argsort(order)[of], self.prompts[rows])

    def counts(self) -> Duplicates:
        """How many sequences, how many of them distinct, and how many equal pairs."""
        return Duplicates(sequences=len(self.of), distinct=len(self.first), equal_pairs=self.equal_pairs)


def distinct_sequences(labels: SequenceLabels, gram: np.ndarray) -> DistinctSequences:
    """Sequences are equal where prompt, completion and length are, and their gradients too: gram is (n, n) K1.

    Texts alone would not do: other tokens may decode to the same text.
    """
    squared = np.diag(gram)
    known: dict[tuple[str, str, float], list[int]] = {}
    first: list[int] = []
    of = np.zeros(len(labels), dtype=np.int64)
    for i in range(len(labels)):
        alike = known.setdefault((_prompt(labels, i), labels.completion[i], float(labels.length[i])), [])
        for place in alike:
            j = first[place]
            if squared[i] + squared[j] - 2 * gram[i, j] <= _SAME_GRADIENT * (squared[i] + squared[j]) / 2:
                of[i] = place
                break
        else:
            of[i] = len(first)
            alike.append(len(first))
            first.append(i)
    return DistinctSequences(np.array(first, dtype=np.int64), of, _merged_prompts(labels))


def equal_across(left: SequenceLabels, right: SequenceLabels, kernel: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """(n_left, n_right) bool: equal sequences of two buffers; kernel (n_left, n_right) between them, gram of the right one."""
    same = np.array(
        [
            [
                _prompt(left, t) == _prompt(right, i)
                and left.completion[t] == right.completion[i]
                and left.length[t] == right.length[i]
                for i in range(len(right))
            ]
            for t in range(len(left))
        ],
        dtype=bool,
    ).reshape(len(left), len(right))
    return same & (np.abs(kernel - np.diag(gram)) <= _SAME_GRADIENT * np.diag(gram))


def _prompt(labels: SequenceLabels, i: int) -> str:
    """A prompt's text; where there is none, its number stands for it."""
    return labels.prompt[i] or f"\0{labels.prompt_index[i]}"


def _merged_prompts(labels: SequenceLabels) -> np.ndarray:
    """(n,) prompt numbers; of one text drawn under several numbers, the first."""
    number: dict[str, int] = {}
    return np.array(
        [number.setdefault(_prompt(labels, i), int(labels.prompt_index[i])) for i in range(len(labels))], dtype=np.int64
    )
