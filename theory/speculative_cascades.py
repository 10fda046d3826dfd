r"""Speculative cascades: a draft's token kept or handed to the target, one knob from lossless speculation to a cascade.

At each position the draft has the law q and the target p over a vocabulary. The rule defers (delta = 1) or not, and
the text follows :math:`\pi = (1 - \delta) q + \delta p`, executed without loss against :math:`\pi` by speculative
sampling: a draft token v is kept with probability :math:`\min(1, \pi(v)/q(v))`. ``alpha`` is the price of a rejection
in units of quality (the loss is 1 - P(right token)), so a larger alpha defers less. :func:`knob` reads quality against
speed along it.

The same idea for whole answers: a lower tier's answer that the stop rule rejects is the draft that the next tier
verifies (:func:`answer_as_draft`), which lowers what an escalation costs (:func:`escalation_cost`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import require
from .speculation import speedup, tokens_per_round

Array = NDArray[np.float64]
Rule = Literal["speculation", "cascade", "chow", "difference", "optimal"]

TokenRule = Literal["draft", "target", "relative"]

RULES: tuple[Rule, ...] = ("speculation", "cascade", "chow", "difference", "optimal")
TOKEN_RULES: tuple[TokenRule, ...] = ("draft", "target", "relative")
SUM_TOLERANCE = 1e-9  # how far from 1 a law may add up [-]


def total_variation(p: ArrayLike, q: ArrayLike) -> Array:
    r"""Return :math:`D_{TV}(p, q) = \tfrac12 \sum_v |p(v) - q(v)|` of laws over the last axis [-].

    Examples
    --------
    >>> float(total_variation([0.5, 0.5, 0.0], [0.5, 0.0, 0.5]))
    0.5
    """
    a, b = _laws(p, q)
    return np.asarray(np.abs(a - b).sum(axis=-1) / 2)


def defers(p: ArrayLike, q: ArrayLike, alpha: float, rule: Rule) -> NDArray[np.bool_]:
    r"""Return at which positions the target's law is used, shape of p without the last axis.

    .. math::
        \text{chow: } \max q < 1 - \alpha, \qquad
        \text{difference: } \max q < \max p - \alpha, \qquad
        \text{optimal: } \max q < \max p - \alpha D_{TV}(p, q)

    ``speculation`` always defers (the target's law exactly), ``cascade`` never does (the draft's law).

    Parameters
    ----------
    p, q : (..., V) arrays
        Laws of the target and the draft [-].
    alpha : float
        Price of a rejection, at least 0 [quality].
    rule : str

    Raises
    ------
    InputError
        If a law has negative entries or does not add up to 1, alpha is negative, or the rule is unknown.

    Source
    ------
    Narasimhan et al. (2025), arXiv:2405.19261: Chow eq. (2), difference eq. (5), optimal eq. (10); the authors' code
    (google-research/speculative_cascades) takes the maxima from the laws at temperature 1 and the distance from those
    sampled; here both are one law. Derivation: the optimal rule minimises
    :math:`(1 - \delta)\ell(q) + \delta(\ell(p) + \alpha D_{TV}(p, q))`, linear in delta, with loss
    :math:`\ell(p) = 1 - \max p` of a calibrated law. The difference rule takes the rejection to be certain (D = 1).

    Examples
    --------
    >>> p, q = [0.9, 0.1], [0.6, 0.4]  # D = 0.3: a gain of 0.3 for at most 0.3 alpha
    >>> bool(defers(p, q, 0.5, "difference")), bool(defers(p, q, 0.5, "optimal"))
    (False, True)
    """
    a, b = _laws(p, q)
    require(alpha >= 0, "alpha", "must be at least 0 [quality]", alpha)
    require(rule in RULES, "rule", f"must be one of {RULES}", rule)
    target, draft = a.max(axis=-1), b.max(axis=-1)
    if rule in ("speculation", "cascade"):
        return np.full(draft.shape, rule == "speculation")
    limits = {"chow": 1.0 - alpha, "difference": target - alpha, "optimal": target - alpha * total_variation(a, b)}
    return np.asarray(draft < limits[rule])


def law(p: ArrayLike, q: ArrayLike, alpha: float, rule: Rule) -> Array:
    r"""Return the law of the text, :math:`\pi = (1 - \delta) q + \delta p`, (..., V) [-]."""
    a, b = _laws(p, q)
    return np.where(defers(a, b, alpha, rule)[..., None], a, b)


def token_law(p: ArrayLike, q: ArrayLike, alpha: float, rule: TokenRule = "relative") -> Array:
    r"""Return the law of a token-specific rule: a draft token of a set A is kept, others come from p, (..., V) [-].

    .. math:: \pi(v) = q(v) 1[v \in A] + p(v) \sum_{u \notin A} q(u)

    .. math:: \text{draft: } q(v) \ge \max p - \alpha, \qquad \text{target: } p(v) \ge \max p - \alpha, \qquad
              \text{relative: } p(v) \ge (1 - \alpha) \max p

    Raises
    ------
    InputError
        If alpha leaves [0, 1], the rule is unknown or a law is refused.

    Source
    ------
    Narasimhan et al. (2025), arXiv:2405.19261, eq. (13), (14) and (15).

    Examples
    --------
    >>> token_law([0.6, 0.4, 0.0], [0.2, 0.3, 0.5], alpha=0.5).round(3).tolist()
    [0.5, 0.5, 0.0]
    """
    a, b = _laws(p, q)
    require(0 <= alpha <= 1, "alpha", "must lie in [0, 1] [-]", alpha)
    require(rule in TOKEN_RULES, "rule", f"must be one of {TOKEN_RULES}", rule)
    most = a.max(axis=-1, keepdims=True)
    good = {"draft": b >= most - alpha, "target": a >= most - alpha, "relative": a >= (1 - alpha) * most}
    kept = np.where(good[rule], b, 0.0)
    return np.asarray(kept + a * (1.0 - kept.sum(axis=-1, keepdims=True)))


def acceptance(text: ArrayLike, q: ArrayLike) -> float:
    r"""Return the mean probability that a draft token is kept when the text is to follow a law [-].

    .. math:: E\Big[\sum_v q(v) \min(1, \pi(v)/q(v))\Big] = E[\sum_v \min(\pi(v), q(v))] = 1 - E[D_{TV}(\pi, q)]

    With :math:`\pi = (1 - \delta) q + \delta p` the rejection is :math:`\delta D_{TV}(p, q)`: only where it defers.
    Tokens per round follow from it as for lossless speculation (:func:`theory.speculation.tokens_per_round`).

    Source
    ------
    Leviathan, Kalman & Matias (2023), arXiv:2211.17192, theorem 3.5.

    Examples
    --------
    >>> p, q = [[0.9, 0.1], [0.5, 0.5]], [[0.6, 0.4], [0.5, 0.5]]
    >>> acceptance(law(p, q, 0.0, "speculation"), q), acceptance(law(p, q, 0.0, "cascade"), q)
    (0.85, 1.0)
    """
    return round(float(1.0 - np.mean(total_variation(text, q))), 15)


def agreement(text: ArrayLike, p: ArrayLike) -> float:
    r"""Return the mean probability, under the target's law, of a token of the text, :math:`E[\sum_v \pi(v) p(v)]` [-].

    The expected quality where p is the law of the right token. It is largest for greedy text, not for p itself.
    """
    a, b = _laws(text, p)
    return float(np.mean((a * b).sum(axis=-1)))


def objective(p: ArrayLike, q: ArrayLike, alpha: float, deferred: NDArray[np.bool_]) -> float:
    r"""Return the mean loss with the price of rejections of a rule given by where it defers [quality].

    .. math:: E[(1 - \delta)(1 - \max q) + \delta (1 - \max p + \alpha D_{TV}(p, q))]

    Assumes
    -------
    Calibrated laws, so that 1 - max is the error of the most likely token.

    Source
    ------
    Narasimhan et al. (2025), arXiv:2405.19261, as summarised second-hand.
    """
    a, b = _laws(p, q)
    handed = 1.0 - a.max(axis=-1) + alpha * total_variation(a, b)
    return float(np.mean(np.where(deferred, handed, 1.0 - b.max(axis=-1))))


class Setting(NamedTuple):
    """One position of the knob between lossless speculation and a cascade."""

    alpha: float  # price of a rejection [quality]
    deferred: float  # share of positions that follow the target's law [-]
    acceptance: float  # of a draft token [-]
    tokens_per_round: float  # [tokens/round]
    speedup: float  # over the target alone, one token a step [-]
    quality: float  # probability under the target's law of a token of the text, :func:`agreement` [-]
    loss: float  # expected loss, rejections not priced (:func:`objective` at alpha 0) [quality]


def knob(
    p: ArrayLike, q: ArrayLike, alphas: ArrayLike, rule: Rule, *, length: int, draft_cost: float, verify_cost: float = 1
) -> tuple[Setting, ...]:
    r"""Return quality and speed along the price of a rejection.

    .. math:: S(\alpha) = \frac{E[N](\beta, \gamma)}{\gamma c + v}, \qquad \beta = 1 - E[D_{TV}(\pi_\alpha, q)]

    The optimal and the difference rule at alpha 0 defer where the target is surer: no more than ``speculation`` does.
    At large alpha nothing is deferred: every round emits its gamma + 1 tokens, and the verify pass could be left out.

    Parameters
    ----------
    p, q : (n, V) arrays
        Laws at n positions, a sample of the text [-].
    alphas : (m,) array
        Prices of a rejection [quality].
    rule : str
    length : int
        gamma [tokens].
    draft_cost, verify_cost : float
        c and v, draft step and verify pass over the target's step [-].

    Assumes
    -------
    Positions of a round are drawn from the sample independently: acceptance at one says nothing of the next.

    Raises
    ------
    InputError
        If a law, an alpha, the rule, the length or a cost is refused.

    Source
    ------
    Narasimhan et al. (2025), arXiv:2405.19261, for the law; Leviathan et al. (2023), arXiv:2211.17192, for the speed.

    Examples
    --------
    >>> p, q = [[0.9, 0.1], [0.5, 0.5]], [[0.3, 0.7], [0.5, 0.5]]
    >>> [(s.alpha, round(s.acceptance, 3), round(s.speedup, 3)) for s in knob(p, q, (0.0, 2.0), "optimal", length=4,
    ...     draft_cost=0.1)]
    [(0.0, 0.7, 1.981), (2.0, 1.0, 3.571)]
    """
    settings = []
    for alpha in np.atleast_1d(np.asarray(alphas, dtype=np.float64)):
        deferred = defers(p, q, float(alpha), rule)
        text = law(p, q, float(alpha), rule)
        beta = acceptance(text, q)
        settings.append(
            Setting(
                float(alpha),
                float(np.mean(deferred)),
                beta,
                float(tokens_per_round(beta, length)),
                float(speedup(beta, length, target=1.0, verify=verify_cost, draft=draft_cost)),
                agreement(text, p),
                objective(p, q, 0.0, deferred),
            )
        )
    return tuple(settings)


# ---------------------------------------------------------------- a rejected answer as the draft of the next tier


class Reuse(NamedTuple):
    """What the next tier does with a rejected answer as its draft; means over what it accepts."""

    passes: float  # verify passes [-]
    decoded: float  # tokens decoded one by one after the draft is given up [tokens]
    kept: float  # tokens of the draft that stand [tokens]
    time_s: float  # of passes and decoding [s]
    plain_s: float  # of decoding every token [s]

    @property
    def saved(self) -> float:
        """Share of the decoding time that is saved; below 0 where the passes cost more than they bring [-]."""
        return 1.0 - self.time_s / self.plain_s


def prefix_law(accepted: ArrayLike) -> Array:
    r"""Return P(the first k tokens of a draft of n stand and the next does not), k = 0..n, (n + 1,) [-].

    .. math:: P(A = k) = (1 - a_{k+1}) \prod_{i \le k} a_i, \qquad P(A = n) = \prod_i a_i

    Parameters
    ----------
    accepted : (n,) array
        :math:`a_i`, acceptance of token i given that those before it stand [-].

    Source
    ------
    Derivation: the agreed prefix ends at the first rejection.

    Examples
    --------
    >>> prefix_law([0.5, 0.5]).tolist()
    [0.5, 0.25, 0.25]
    """
    a = _accepted(accepted)
    stands = np.concatenate([[1.0], np.cumprod(a)])
    return np.asarray(stands - np.append(stands[1:], 0.0))


def answer_as_draft(accepted: ArrayLike, verify_s: ArrayLike, decode_s: float, realigned: float = 0.0) -> Reuse:
    r"""Return what it takes to turn a rejected answer of n tokens into the next tier's own, losslessly.

    One pass verifies the next :math:`w = \min(W, n - i)` tokens of the draft. The first of them that falls is replaced
    by the tier's own token; then the tail of the draft goes on fitting with probability r, otherwise the rest is
    decoded:

    .. math:: T(i) = v_w + a_{i..i+w} T(i + w)
              + \sum_{k < w} P(A = k) \big(r\,T(i + k + 1) + (1 - r)(n - i - k - 1)\, d\big), \qquad T(n) = 0

    Parameters
    ----------
    accepted : (n,) array
        Acceptance of each token given that those before it stand [-].
    verify_s : (W,) array
        Time of a pass that verifies 1..W tokens [s].
    decode_s : float
        d, time of a token decoded by the tier, with its own draft if it has one [s].
    realigned : float
        r, probability that after a replaced token the tail still fits token for token [-]. 0: the draft ends at its
        first wrong token; 1: only that token was wrong.

    Assumes
    -------
    Both answers have n tokens, and a tail that fits has the acceptances it had. The bonus token of a pass that accepts
    everything it verified is not used: it is the first that the next pass would verify.

    Raises
    ------
    InputError
        If an acceptance or r is no probability, there is no token, or a time is not above 0.

    Source
    ------
    Derivation; verification as in Leviathan et al. (2023), arXiv:2211.17192.

    Examples
    --------
    200 tokens at acceptance 0.8 and a pass that costs two steps: four tokens stand, and that is all.

    >>> reuse = answer_as_draft([0.8] * 200, [0.02] * 200, 0.01)
    >>> round(reuse.kept, 3), round(reuse.saved, 3)
    (4.0, 0.015)
    >>> round(answer_as_draft([0.8] * 200, [0.02] * 8, 0.01, realigned=1.0).saved, 3)
    0.514
    """
    a, verify = _accepted(accepted), np.asarray(verify_s, dtype=np.float64)
    timed = verify.ndim == 1 and verify.size > 0 and bool(np.all(np.isfinite(verify) & (verify > 0)))
    require(timed, "verify_s", "must be one or more finite times above 0 [s]", verify)
    require(decode_s > 0 and np.isfinite(decode_s), "decode_s", "must be finite and above 0 [s]", decode_s)
    require(0 <= realigned <= 1, "realigned", "must lie in [0, 1] [-]", realigned, "It is a share: pass 0.8, not 80.")
    n = len(a)
    left = n - np.arange(n + 1.0)  # tokens still to come
    plain = np.column_stack([0 * left, left, 0 * left, decode_s * left])  # the rest decoded
    ahead = np.zeros((n + 1, 4))  # from each token on: passes, decoded, kept, time
    for i in reversed(range(n)):
        w = min(len(verify), n - i)
        prefix = prefix_law(a[i : i + w])
        after = realigned * ahead[i + 1 : i + w + 1] + (1 - realigned) * plain[i + 1 : i + w + 1]
        ahead[i] = (1.0, 0.0, prefix @ np.arange(w + 1.0), verify[w - 1])
        ahead[i] += prefix[:w] @ after + prefix[w] * ahead[i + w]
    passes, decoded, kept, time = (float(x) for x in ahead[0])
    return Reuse(passes, decoded, kept, time, decode_s * n)


def escalation_cost(cost: float, reuse: Reuse, decode_share: float) -> float:
    r"""Return what a visit of the next tier costs when it verifies the rejected answer first [cost unit].

    .. math:: c' = c\,\Big(1 - s_d\, \frac{T_{plain} - T}{T_{plain}}\Big)

    Parameters
    ----------
    cost : float
        c, of a visit that decodes everything [cost unit].
    reuse : Reuse
    decode_share : float
        :math:`s_d`, share of that cost that decoding is, the rest being the prompt's [-].

    Raises
    ------
    InputError
        If the cost is negative or the share no share.

    Source
    ------
    Derivation: the share of the cost that decoding makes shrinks, the rest stays.

    Examples
    --------
    >>> round(escalation_cost(8.8, answer_as_draft([1.0] * 100, [0.05] * 100, 0.01), 0.9), 3)
    1.276
    """
    require(cost >= 0, "cost", "must be at least 0 [cost unit]", cost)
    require(0 <= decode_share <= 1, "decode_share", "must lie in [0, 1] [-]", decode_share)
    return cost * (1.0 - decode_share * reuse.saved)


def _accepted(accepted: ArrayLike) -> Array:
    a = np.asarray(accepted, dtype=np.float64)
    ok = a.ndim == 1 and a.size > 0 and bool(np.all((a >= 0) & (a <= 1)))
    rule = "must be one or more probabilities, one for each token [-]"
    require(ok, "accepted", rule, a, "It is a fraction: pass 0.8, not 80.")
    return a


def _laws(p: ArrayLike, q: ArrayLike) -> tuple[Array, Array]:
    """Return two laws as arrays of one shape after checking them."""
    a, b = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    require(a.ndim > 0 and a.shape == b.shape, "q", f"must have the shape of the other law {a.shape}", b.shape)
    for name, value in (("p", a), ("q", b)):
        off = float(np.abs(value.sum(axis=-1) - 1.0).max(initial=0.0))
        require(bool(np.all(value >= 0)) and off <= SUM_TOLERANCE, name, "must be at least 0 and add up to 1 [-]", off)
    return a, b
