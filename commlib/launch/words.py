"""What commrun and a host.py agree in: how a conversation begins, and how either knows that the other is gone."""

MARK = b"\n\0commlib host\n"   # login scripts may print before it
FOR_HOST_ONLY = ("PYTHONSAFEPATH",)  # given to host.py, whose folder there is any; ranks want their script's on the path
LOST_S = 30.0                  # silence after which the other counts as gone, unless --heartbeat-timeout says otherwise
_BEATS = 5                     # signs of life within that time
_LONGEST_BEAT_S = 2.0


def beat_s(lost_s: float) -> float:
    """How often either side says that it lives."""
    return min(_LONGEST_BEAT_S, lost_s / _BEATS)
