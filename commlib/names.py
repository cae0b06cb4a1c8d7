"""Names of operations, and the keys by which ranks match them.

A key is a 64-bit hash of (group, kind, name), mixed with the number of times that the name was used before. Ranks that
use the same names as often as each other get the same keys, in whatever order; nothing is negotiated.
"""

import hashlib

# From one use of a name to its next: 2^64 / golden ratio, odd: the n-th uses of one name are distinct for 2^64 uses and far apart.
STRIDE = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

# Uses of a name in one epoch, at most: the first use of each epoch is a multiple of it.
EPOCH = 1 << 40


def base_key(group, kind, name):
    """64 bits that stand for (group, kind, name); name None: the unnamed operations of that kind."""
    text = f"{group}\0{kind}\0" + ("" if name is None else f"={name}")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def key_of_use(base, use):
    """The key of the use-th operation of a name."""
    return (base + use * STRIDE) & _MASK


def busy_text(kind, name):
    """What is said to who uses a name that is in flight."""
    return f"{kind} {name!r} is still in flight: wait for it first, or give this one another name"


class Use:
    """What is remembered of one name of one kind: how often it was used, and what it asked for last.

    `nmembers` is how many ranks its operations have. `request` and `signature` belong to whoever submits: a repeated call
    fills in only what changed.
    """

    __slots__ = ("base", "name", "count", "handle", "request", "signature", "keep", "wish", "dtype", "shape", "nmembers")

    def __init__(self, group, kind, name, nmembers, count=0):
        self.nmembers = nmembers
        self.base = base_key(group, kind, name)
        self.name = name
        self.count = count
        self.handle = None
        self.request = None
        self.signature = None
        self.keep = None
        self.wish = self.dtype = self.shape = None  # of the NumPy array that `request` describes, as its user called

    def next_key(self):
        """Counts one more use and returns its key."""
        key = (self.base + self.count * STRIDE) & _MASK
        self.count += 1
        return key

    def forget_request(self):
        """What was asked for last is out of date; how often the name was used is not."""
        self.request = self.signature = self.keep = self.wish = None


class Names:
    """All names that one communicator has used, per kind.

    Args:
        group: the name of its group, in the keys.
        kinds: of operations.
        nmembers: how many ranks the group has.
    """

    __slots__ = ("group", "nmembers", "first", "_uses")

    def __init__(self, group, kinds, nmembers, first=0):
        self.group = group
        self.nmembers = nmembers
        self.first = first  # the number of the first use in this epoch
        self._uses = {kind: {} for kind in kinds}

    def begin_epoch(self, first):
        """All ranks have joined: whatever they have used differently before, they count from here alike."""
        self.first = first
        for uses in self._uses.values():
            for use in list(uses.values()):
                use.count = first

    def used_in_epoch(self):
        """(base key, how often it was used in this epoch) of every name."""
        return [(use.base, use.count - self.first) for uses in self._uses.values() for use in list(uses.values())
                if use.count > self.first]  # fmt: skip

    def used(self, kind):
        """The records of all names of a kind that were used, by name."""
        return self._uses[kind]

    def use(self, kind, name):
        """The record of a name, made at its first use."""
        uses = self._uses[kind]
        use = uses.get(name)
        if use is None:
            if name is not None and type(name) is not str:
                raise TypeError(f"the name of an operation is a string, not {type(name).__name__}")
            use = uses.setdefault(name, Use(self.group, kind, name, self.nmembers, self.first))  # another thread may be first
        return use
