"""Solutions of notebooks/16_chunked_prefill.ipynb, and mistakes that its checks must refuse."""


def steps_to_first(prompt, readers, budget):
    return -(-prompt // (budget - readers))


def steps_to_first_wrong(prompt, readers, budget):
    """Forgets the readers."""
    return -(-prompt // budget)


def steps_to_first_wrong_2(prompt, readers, budget):
    """A step of its own for the first token."""
    return -(-prompt // (budget - readers)) + 1


def keys_read(prompt, chunk):
    return sum(min(start + chunk, prompt) for start in range(0, prompt, chunk))


def keys_read_wrong(prompt, chunk):
    """The last chunk as long as the others."""
    return sum(range(chunk, prompt + chunk, chunk))


def keys_read_wrong_2(prompt, chunk):
    """Without the chunk's own keys."""
    return sum(range(0, prompt, chunk))


def share(behind, budget, threshold):
    got = [0] * len(behind)
    for i in sorted(range(len(behind)), key=lambda i: behind[i] > 1):
        got[i] = min(behind[i], budget, threshold or budget)
        budget -= got[i]
    return got


def share_wrong(behind, budget, threshold):
    """In order of arrival: readers wait for prompts."""
    got = []
    for n in behind:
        got.append(min(n, budget, threshold or budget))
        budget -= got[-1]
    return got


def share_wrong_2(behind, budget, threshold):
    """0 taken for a bound."""
    got = [0] * len(behind)
    for i in sorted(range(len(behind)), key=lambda i: behind[i] > 1):
        got[i] = min(behind[i], budget, max(threshold, 1))
        budget -= got[i]
    return got
