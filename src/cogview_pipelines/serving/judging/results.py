"""What judges found: means, deviations, win rates, and who was careless."""

import itertools
import math
import statistics
from collections.abc import Sequence

from .answers import Answer, Answers
from .study import GRADES

LEAST_AGREEMENT = 0.8  # CogView, appendix E
_CONFIDENCE = 0.95
_DECISIVE = "overall"


def summarize(answers: Answers, least_agreement: float = LEAST_AGREEMENT) -> dict:
    """
    The results of a study, for JSON.

    Args:
        answers ([`Answers`]): The file.
        least_agreement (`float`, defaults to 0.8): Judges whose best picture has their highest overall grade in a
            smaller share of their answers are careless and not counted. In A/B mode nobody is.
    """
    names, is_pair = answers.study["models"], answers.study["mode"] == "ab"
    judges, kept = [], []
    for name, token in answers.judges().items():
        own = list(answers.of(token).values())
        share = None if is_pair or not own else agreement(own)
        counts = bool(own) and (share is None or share >= least_agreement)
        judges.append({"judge": name, "answers": len(own), "agreement": share, "counts": counts})
        kept += own if counts else []
    return {
        "mode": answers.study["mode"],
        "captions": len(answers.study["captions"]),
        "answers": len(kept),
        "judges": judges,
        "models": [_of_model(name, number, kept) for number, name in enumerate(names)],
        "pairs": [_of_pair(names, pair, kept) for pair in itertools.combinations(range(len(names)), 2)],
    }


def agreement(answers: Sequence[Answer]) -> float:
    """In what share of answers no picture has a higher overall grade than the best one."""
    agreeing = 0
    for answer in answers:
        overall = [grades[_DECISIVE] for grades in answer.grades or ()]
        agreeing += bool(overall) and overall[answer.best] == max(overall)
    return agreeing / len(answers)


def win_rate(wins: int, count: int) -> dict:
    """
    A share with its interval of 95 % confidence, that of Wilson (1927), which takes all answers as independent.
    """
    if not count:
        return {"wins": wins, "of": count, "rate": None, "low": None, "high": None}
    z = statistics.NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    rate, square = wins / count, z * z / count
    middle = (rate + square / 2) / (1 + square)
    half = z * math.sqrt(rate * (1 - rate) / count + square / (4 * count)) / (1 + square)
    return {"wins": wins, "of": count, "rate": rate, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def _of_model(name: str, number: int, answers: Sequence[Answer]) -> dict:
    result: dict = {"model": name, "best": win_rate(sum(answer.best == number for answer in answers), len(answers))}
    for question in GRADES:
        grades = [answer.grades[number][question] for answer in answers if answer.grades]
        if grades:
            deviation = statistics.stdev(grades) if len(grades) > 1 else None
            result[question] = {"mean": statistics.fmean(grades), "deviation": deviation}
    return result


def _of_pair(names: Sequence[str], pair: tuple[int, int], answers: Sequence[Answer]) -> dict:
    """How often the first is better than the second: by overall grade, in A/B mode by choice."""
    first, second = pair
    wins, losses, ties = 0, 0, 0
    for answer in answers:
        if answer.grades:
            difference = answer.grades[first][_DECISIVE] - answer.grades[second][_DECISIVE]
        else:
            difference = (answer.best == first) - (answer.best == second)
        wins, losses, ties = wins + (difference > 0), losses + (difference < 0), ties + (difference == 0)
    return {"models": [names[first], names[second]], "ties": ties, **win_rate(wins, wins + losses)}
