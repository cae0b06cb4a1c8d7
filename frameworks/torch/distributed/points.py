"""Send and receive: a broadcast among two ranks, of which one is the root.

Messages of one sender, one receiver and one tag come in order; those of different tags do not wait for each other. A send
begins when the receive is there, as with gloo for all but small messages. Knows tensors as Buffers only.
"""

import threading
import time

from commlib.torch.distributed.work import Work

_PAUSE_S = (20e-6, 1e-3)  # the first and the longest pause between two looks for a message of anybody's

_RECEIVER, _SENDER = 0, 1  # places in the group of two: its first rank is told when the other begins


class Points:
    """The channels between this rank of a group and the others.

    Args:
        communicator: the group's, of commlib.
    """

    def __init__(self, communicator):
        self.rank, self.size = communicator.rank, communicator.size
        self._communicator = communicator
        self._channels = {}
        self._lock = threading.Lock()

    def send(self, buffer, receiver, tag):
        """Begins to send; returns the core's Handle."""
        return self._channel(self.rank, receiver, tag).broadcast_async_(buffer, _SENDER)

    def receive(self, buffer, sender, tag):
        """Begins to receive the next message of a sender; returns the core's Handle."""
        return self._channel(sender, self.rank, tag).broadcast_async_(buffer, _SENDER)

    def find(self, buffer, tag):
        """Begins to receive from whoever has begun to send. Returns (sender, Handle), or None: nobody has."""
        for sender in range(self.size):
            if sender == self.rank:
                continue
            channel = self._channel(sender, self.rank, tag)
            with self._lock:  # another thread of this rank must not take the same message
                if channel.is_begun("broadcast"):
                    return sender, channel.broadcast_async_(buffer, _SENDER)
        return None

    def _channel(self, sender, receiver, tag):
        """The core's communicator of (receiver, sender), of which there is one for each direction and tag."""
        key = (sender, receiver, tag)
        channel = self._channels.get(key)
        if channel is None:
            with self._lock:
                if key not in self._channels:
                    name = f"messages with tag {tag}"
                    self._channels[key] = self._communicator.group([receiver, sender], name=name)
                channel = self._channels[key]
        return channel


class FromAnybody(Work):
    """A receive whose sender is not known yet: it takes the first message that it sees when it is waited for.

    Args:
        points: where to look.
        buffer: the memory that receives.
        tag: of the message; the others are as for Work.
    """

    def __init__(self, points, buffer, tag, what, attendant, tensors, land, timeout_s):
        super().__init__(what, attendant, [], tensors, land, timeout_s)
        self._points, self._buffer, self._tag = points, buffer, tag
        self._finding = threading.Lock()

    def _begins_by(self, end_s):
        pause_s = _PAUSE_S[0]
        while not self._has_found():
            if end_s is not None and time.monotonic() >= end_s:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S[1])
        return True

    def _has_found(self):
        with self._finding:
            if not self._handles and self._source < 0:
                found = self._points.find(self._buffer, self._tag)
                if found is not None:
                    self._source, handle = found
                    self._handles = [handle]
            return self._source >= 0
