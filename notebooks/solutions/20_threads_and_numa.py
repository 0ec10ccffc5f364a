"""Solutions of notebooks/20_threads_and_numa.ipynb, and mistakes that its checks must refuse."""

import math


def best_speedup(tasks, threads):
    return tasks / -(-tasks // threads)


def best_speedup_wrong(tasks, threads):
    """As if tasks could be cut."""
    return min(tasks, threads)


def best_speedup_wrong_2(tasks, threads):
    """Rounds the longest share down."""
    return tasks / max(1, tasks // threads)


def crossing(rate, launch, gain):
    return launch * rate * gain / (gain - 1) if gain > 1 else math.inf


def crossing_wrong(rate, launch, gain):
    """As if all threads together took no time."""
    return launch * rate if gain > 1 else math.inf


def crossing_wrong_2(rate, launch, gain):
    """Never asks whether they are faster at all."""
    return launch * rate * gain / (gain - 1) if gain != 1 else math.inf


def cores_of_engines(num_cores, num_engines):
    base, rest = divmod(num_cores, num_engines)
    engines, first = [], 0
    for e in range(num_engines):
        end = first + base + (e < rest)
        engines.append(list(range(first, end)))
        first = end
    return engines


def cores_of_engines_wrong(num_cores, num_engines):
    """In turn: neighbours apart."""
    return [list(range(e, num_cores, num_engines)) for e in range(num_engines)]


def cores_of_engines_wrong_2(num_cores, num_engines):
    """What is left over is left over."""
    each = num_cores // num_engines
    return [list(range(e * each, (e + 1) * each)) for e in range(num_engines)]
