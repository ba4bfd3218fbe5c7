"""The controller that moves the throughput threshold with the queue.

e = mean queue / batch - 0.5, 0 inside a dead band of 0.25 and counted from its edge outside; theta = middle + kp * e +
the sum of ki * e. A long queue raises theta (steps first), a short one lowers it (decodes first). All integers, ppm.
"""

from __future__ import annotations

from synerdiff.core import PPM

TARGET_PPM = 500_000
DEAD_BAND_PPM = 250_000
SMOOTHING_PPM = 100_000
LONGEST_BATCHES = 2


class ThetaController:
    """PI control with clamps.

    ``low`` and ``high`` bound theta (ppm), and the integrator is bounded so that it alone can just reach them. While
    theta is held by a bound, or by what decodes can sustain, the integrator does not move further that way.
    """

    __slots__ = ("_half", "_high", "_integral", "_ki", "_kp", "_low", "_middle", "_queue", "_rest", "theta_ppm")

    def __init__(self, low_ppm: int, high_ppm: int, kp_ppm: int, ki_ppm: int) -> None:
        self._low, self._high = low_ppm, high_ppm
        self._kp, self._ki = kp_ppm, ki_ppm
        self._middle = (low_ppm + high_ppm) // 2
        self._half = (high_ppm - low_ppm) // 2
        self._integral = 0
        self._queue = 0
        """Smoothed number of waiting samples, ppm of a sample."""
        self._rest: tuple[int, int, int] | None = None
        """The input that last changed nothing: it will not do so again."""
        self.theta_ppm = self._middle

    def update(self, waiting: int, batch: int, sustainable_ppm: int) -> int:
        """One step later: theta for ``waiting`` samples and a batch limit, never above ``sustainable_ppm``."""
        given = (waiting, batch, sustainable_ppm)
        if given == self._rest:
            return self.theta_ppm
        state = (self._queue, self._integral, self.theta_ppm)
        # Two batches are as long as a queue counts; else the mean would stay high long after it.
        most = LONGEST_BATCHES * batch
        self._queue += ((waiting if waiting < most else most) * PPM - self._queue) * SMOOTHING_PPM // PPM
        error = self._queue // batch - TARGET_PPM
        if error > DEAD_BAND_PPM:
            error -= DEAD_BAND_PPM
        elif error < -DEAD_BAND_PPM:
            error += DEAD_BAND_PPM
        else:
            error = 0
        top = self._high if self._high < sustainable_ppm else sustainable_ppm
        bottom = self._low if self._low < top else top
        before = self._integral
        integral = before + self._ki * error // PPM
        if integral > self._half:
            integral = self._half
        elif integral < -self._half:
            integral = -self._half
        proportional = self._middle + self._kp * error // PPM
        theta_ppm = proportional + integral
        # Anti-windup: only so much is stored as takes theta to the bound, and nothing is taken away for it.
        if theta_ppm > top:
            integral = max(min(before, integral), top - proportional)
            theta_ppm = top
        elif theta_ppm < bottom:
            integral = min(max(before, integral), bottom - proportional)
            theta_ppm = bottom
        self._integral = integral
        self.theta_ppm = theta_ppm
        self._rest = given if state == (self._queue, self._integral, self.theta_ppm) else None
        return self.theta_ppm
