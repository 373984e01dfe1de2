"""The rule that plans the training of a linear head from public facts alone.

A phase that trains a head on frozen features, with full batches, adds Gaussian noise whose size is
known before any record is read. So is its effect on the outputs: with a learning rate r, T rounds
of noise multiplier s, clip norm C, n expected units at each of S sites and features x, the noise
alone gives an output the standard deviation

    tau = r s C / (n sqrt(S)) gain(T) sqrt(E |x|^2 + 1) sqrt(1 - 1 / K)

(`output_noise`): the server takes the mean over the sites, `gain` is what momentum and the average
of the later iterates make of it, the 1 is the bias' own feature, and of K logits whose mean does
not count the share 1 - 1/K is left. The rule takes the learning rate at which tau is the target
of the task (`target_noise`), or `largest_rate` if that is less.

Why tau and not the rate. For a squared error with D equally strong features, a signal of standard
deviation A and a noise of nu an output and unit of time, gradient flow for a time t leaves the
error A^2 exp(-2 x) + D^2 nu^2 x (1 - exp(-2 x)) / (2 R^2 h^2), with x = t h R^2 / D, h the loss'
curvature and R^2 = E |x|^2. At its minimum tau = x sqrt(rho) A with rho = (D nu / (R h A))^2: from
rho = 0.01 to rho = 10 that is 0.3 A to 0.65 A, while the best rate changes a hundredfold.

The number of rounds costs no privacy at a given budget: the noise of a step grows with sqrt(T), and
the rate at a given tau falls with T. More rounds only make each step smaller.

Limits: full batches, plain steps, equal weights of the sites, a linear head. The noise multiplier
is that of the exact Gaussian mechanism; an accountant that needs more noise raises tau by as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

VERSION = 1
ROUNDS = 60
ROUNDS_OF_NUMBER = 100  # of a regression, whose loss bears no large steps
SERVER_MOMENTUM = 0.9
AVERAGING_START = 0.5
# The clip norm over the first gradient's norm, that of a record whose features have mean square
# norm. Gradients cut to one norm keep it while errors shrink, and the noise is relative to the clip
# norm. Where classes have weights it is 1: a lower one would undo the weights.
CLIP_SHARE = 0.25
CLIP_SHARE_OF_NUMBER = 0.12  # of a regression, whose errors end far below one half
CLIP_SHARE_OF_WORDS = 0.1  # where a record's gradient is the mean of its words', which differ
NOISE_OF_CLASSES = 1.0  # tau of two classes
NOISE_PER_DOUBLING = 0.15  # what each doubling of the classes adds
# tau of a logit of its own, of multi-label and ranking: of two classes that is the difference of
# the logits, which has twice the standard deviation of each less their mean.
NOISE_OF_LABEL = 2.0
NOISE_OF_NUMBER = 0.08  # tau of a regression, whose targets lie between 0 and 1
STABLE_SHARE = 0.7  # of the largest rate at which the heavy ball converges for a regression
LARGEST_STEP = 60.0  # of a logit in a round, were all clipped gradients alike

HeadTask = Literal["classification", "tokens", "multi-label", "ranking", "regression"]


@dataclass(frozen=True)
class HeadFacts:
    """What the rule needs to know, all of it public.

    Attributes:
        task: The task's kind.
        outputs: How many outputs the head has.
        feature_norm: Root mean square L2 norm of the head's inputs.
        units: How many units (records or entities) a site is expected to have.
        sites: How many sites there are.
        epsilon: Of the guarantee of a run at each site.
        delta: Of the same guarantee.
        budget_share: Share of the privacy budget that the phase spends.
        class_weights: What the classes count in the loss; None if they count alike.
    """

    task: HeadTask
    outputs: int
    feature_norm: float
    units: float
    sites: int
    epsilon: float
    delta: float
    budget_share: float = 1.0
    class_weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class HeadPlan:
    """What the rule plans, in the contract's own words.

    Attributes:
        rounds: phases.rounds.
        sampling_rate: phases.sampling_rate.
        head_lr: phases.head_lr.
        clip_norm: privacy.clip_norm.
        server_momentum: aggregation.server_momentum.
        averaging_start: aggregation.averaging_start.
    """

    rounds: int
    sampling_rate: float
    head_lr: float
    clip_norm: float
    server_momentum: float
    averaging_start: float


def plan_head(facts: HeadFacts, clip_norm: float | None = None) -> HeadPlan:
    """The plan of a phase that trains the head alone, with numbers of two digits.

    Args:
        facts: Public facts.
        clip_norm: The clip norm, where it is given; the rule's own if it is None.

    Returns:
        The plan. Equal facts give the same one everywhere.
    """
    rounds = ROUNDS_OF_NUMBER if facts.task == "regression" else ROUNDS
    clip_norm = clip_norm or two_digits(_clip_share(facts) * first_gradient_norm(facts))
    return HeadPlan(
        rounds=rounds,
        sampling_rate=1.0,
        head_lr=two_digits(head_rate(facts, weight_noise(facts, rounds, clip_norm), clip_norm)),
        clip_norm=clip_norm,
        server_momentum=SERVER_MOMENTUM,
        averaging_start=AVERAGING_START,
    )


def head_rate(facts: HeadFacts, noise_at_unit_rate: float, clip_norm: float) -> float:
    """The learning rate of the head in a phase.

    Args:
        facts: Public facts.
        noise_at_unit_rate: The standard deviation of what the phase's noise leaves in a weight at a
            learning rate of 1.
        clip_norm: The clip norm.

    Returns:
        The rate at which noise alone gives an output the standard deviation `target_noise`, or
        `largest_rate` if that is less.
    """
    rate = target_noise(facts) / _of_output(facts, noise_at_unit_rate)
    return min(rate, largest_rate(facts, clip_norm))


def target_noise(facts: HeadFacts) -> float:
    """The standard deviation of an output that noise alone is to have: tau of the rule."""
    if facts.task in ("classification", "tokens"):
        return NOISE_OF_CLASSES + NOISE_PER_DOUBLING * math.log2(facts.outputs / 2)
    return NOISE_OF_NUMBER if facts.task == "regression" else NOISE_OF_LABEL


def output_noise(
    facts: HeadFacts,
    rounds: int,
    head_lr: float,
    clip_norm: float,
    momentum: float = SERVER_MOMENTUM,
    averaging_start: float = AVERAGING_START,
) -> float:
    """tau of a plan: the standard deviation over inputs and noise of an output (of a logit less the
    mean of all, where their softmax counts) at the phase's end, were all gradients 0."""
    noise = weight_noise(facts, rounds, clip_norm, momentum, averaging_start)
    return _of_output(facts, head_lr * noise)


def weight_noise(
    facts: HeadFacts,
    rounds: int,
    clip_norm: float,
    momentum: float = SERVER_MOMENTUM,
    averaging_start: float = AVERAGING_START,
) -> float:
    """The standard deviation of what noise leaves in a weight at a learning rate of 1."""
    gain = math.sqrt(sum(weight**2 for weight in step_weights(rounds, momentum, averaging_start)))
    return round_noise(facts, rounds, clip_norm) * gain


def round_noise(facts: HeadFacts, rounds: int, clip_norm: float) -> float:
    """The standard deviation of the noise in an entry of a round's mean gradient."""
    # Half a second, for which no command waits that only reads a contract.
    from dp_accounting.gaussian_mechanism import get_sigma_gaussian

    of_release = float(get_sigma_gaussian(facts.epsilon, facts.delta))
    multiplier = of_release * math.sqrt(rounds / facts.budget_share)
    return multiplier * clip_norm / (facts.units * math.sqrt(facts.sites))


def _of_output(facts: HeadFacts, of_weight: float) -> float:
    """The standard deviation of an output by independent noise in the weights."""
    return of_weight * input_norm(facts) * math.sqrt(_free_share(facts))


def step_weights(
    rounds: int, momentum: float = SERVER_MOMENTUM, averaging_start: float = AVERAGING_START
) -> Sequence[float]:
    """How often each round's mean update counts in the average that a phase ends with.

    With momentum b the update of round s is in the iterate of round t (1 - b^(t - s + 1)) / (1 - b)
    times. The sum of the squares is the gain of independent noise.
    """
    averaged = [t for t in range(1, rounds + 1) if t > rounds * averaging_start]
    return [
        sum(1 - momentum ** (t - s + 1) for t in averaged if t >= s)
        / ((1 - momentum) * len(averaged))
        for s in range(1, rounds + 1)
    ]


def first_gradient_norm(facts: HeadFacts) -> float:
    """The norm of a record's gradient at the first step, where its features have mean square norm:
    that of a softmax' error at equal probabilities times the largest weight of a class, or of an
    error of one half."""
    error = 0.5
    if facts.task in ("classification", "tokens"):
        error = math.sqrt(_free_share(facts)) * max(facts.class_weights or (1.0,))
    elif facts.task == "multi-label":  # the loss is a mean over the labels
        error = 0.5 / math.sqrt(facts.outputs)
    return error * input_norm(facts)


def largest_rate(facts: HeadFacts, clip_norm: float) -> float:
    """The largest rate, however little noise there is.

    Of a regression STABLE_SHARE of 2 (1 + b) / L, up to which the heavy ball with momentum b
    converges (Polyak 1964) for a squared error of curvature L <= E |x|^2 + 1. The losses of logits
    saturate and their clipped gradients are bounded: there the rate at which a round moves a logit
    by LARGEST_STEP at most, beyond which the classes change no more, and probabilities get worse.
    Classes with weights count in the mean as if those were in inverse proportion to their shares.
    """
    norm = input_norm(facts)
    if facts.task == "regression":
        return STABLE_SHARE * 2 * (1 + SERVER_MOMENTUM) / norm**2
    weights = facts.class_weights or (1.0,)
    first = first_gradient_norm(facts) / max(weights)
    mean = sum(min(clip_norm, first * w) / w for w in weights) / sum(1 / w for w in weights)
    return LARGEST_STEP / (mean * norm)


def _clip_share(facts: HeadFacts) -> float:
    if facts.task == "tokens":
        return CLIP_SHARE_OF_WORDS
    if facts.task == "regression":
        return CLIP_SHARE_OF_NUMBER
    return CLIP_SHARE if facts.class_weights is None else 1.0


def input_norm(facts: HeadFacts) -> float:
    """Root mean square norm of the features with the bias' own."""
    return math.sqrt(facts.feature_norm**2 + 1)


def _free_share(facts: HeadFacts) -> float:
    """1 - 1/K where K logits count up to their mean, else 1."""
    return 1 - 1 / facts.outputs if facts.task in ("classification", "tokens") else 1.0


def two_digits(value: float) -> float:
    """The nearest number with two digits."""
    return float(f"{value:.2g}")
