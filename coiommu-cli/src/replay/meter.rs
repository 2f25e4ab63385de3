//! A quantity over time: its peak, its mean, and its curve.

use std::time::Duration;

/// What a quantity was from a start on. It is told of every change, in order.
#[derive(Debug)]
pub(super) struct Meter {
    value: u64,
    peak: u64,
    /// Value times nanoseconds, up to `seen`.
    area: u128,
    start: Option<Duration>,
    seen: Duration,
    curve: Option<Curve>,
}

impl Meter {
    /// `curve`: whether to keep one.
    pub(super) fn new(curve: bool) -> Self {
        let curve = curve.then(Curve::default);
        Self { value: 0, peak: 0, area: 0, start: None, seen: Duration::ZERO, curve }
    }

    /// Time has come to `now` with the value as it was.
    pub(super) fn advance(&mut self, now: Duration) {
        if self.start.is_some() {
            self.area += u128::from(self.value) * now.saturating_sub(self.seen).as_nanos();
        }
        let start = *self.start.get_or_insert(now);
        if let Some(curve) = &mut self.curve {
            curve.hold(now.saturating_sub(start), self.value);
        }
        self.seen = now;
    }

    /// The value changes, at the time that was last advanced to.
    pub(super) fn set(&mut self, value: u64) {
        self.value = value;
        self.peak = self.peak.max(value);
        if let (Some(curve), Some(start)) = (&mut self.curve, self.start) {
            curve.hold(self.seen.saturating_sub(start), value);
        }
    }

    pub(super) const fn peak(&self) -> u64 {
        self.peak
    }

    pub(super) const fn last(&self) -> u64 {
        self.value
    }

    /// Weighted by time; the last value if there was no time.
    #[allow(clippy::cast_precision_loss, reason = "a mean of pages is not that precise")]
    pub(super) fn mean(&self) -> f64 {
        match self.seen.saturating_sub(self.start.unwrap_or_default()).as_nanos() {
            0 => self.value as f64,
            span => self.area as f64 / span as f64,
        }
    }

    /// Points of the curve: time since the start, and the highest value around then.
    pub(super) fn curve(&self) -> Vec<(Duration, u64)> {
        self.curve.as_ref().map(Curve::points).unwrap_or_default()
    }
}

/// At most this many points are kept of a curve, however long it is.
const MOST_POINTS: usize = 2048;

/// The highest value of each stretch of time. Stretches double when there are too many.
#[derive(Debug)]
struct Curve {
    stretch: Duration,
    peaks: Vec<u64>,
    last: u64,
}

impl Default for Curve {
    fn default() -> Self {
        Self { stretch: Duration::from_micros(1), peaks: Vec::new(), last: 0 }
    }
}

impl Curve {
    /// Since the last call the value was the last; from `at` on it is `value`.
    fn hold(&mut self, at: Duration, value: u64) {
        let mut index = self.index(at);
        while index >= MOST_POINTS {
            self.peaks = self.peaks.chunks(2).map(|pair| pair.iter().copied().max().unwrap_or(0)).collect();
            self.stretch = self.stretch.saturating_mul(2);
            index = self.index(at);
        }
        if self.peaks.len() <= index {
            self.peaks.resize(index + 1, self.last);
        }
        if let Some(peak) = self.peaks.get_mut(index) {
            *peak = value.max(*peak);
        }
        self.last = value;
    }

    fn index(&self, at: Duration) -> usize {
        usize::try_from(at.as_nanos() / self.stretch.as_nanos()).unwrap_or(usize::MAX)
    }

    fn points(&self) -> Vec<(Duration, u64)> {
        (0_u32..).zip(&self.peaks).map(|(index, &peak)| (self.stretch.saturating_mul(index), peak)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_mean_is_weighted_by_time() {
        let mut meter = Meter::new(false);
        meter.advance(SECOND * 10);
        meter.set(100);
        meter.advance(SECOND * 11);
        meter.set(0);
        meter.advance(SECOND * 14);
        assert_eq!((meter.peak(), meter.last(), meter.mean()), (100, 0, 25.0));
    }

    #[test]
    fn without_time_the_mean_is_the_value() {
        let mut meter = Meter::new(true);
        meter.advance(SECOND);
        meter.set(7);
        assert_eq!(meter.mean(), 7.0);
        assert_eq!(meter.curve(), [(Duration::ZERO, 7)]);
    }

    #[test]
    fn a_curve_keeps_peaks_and_stays_small() {
        let mut meter = Meter::new(true);
        for n in 0..100_000 {
            meter.advance(SECOND * n);
            meter.set(if n == 54_321 { 1000 } else { 5 });
        }
        let curve = meter.curve();
        assert!((MOST_POINTS / 2..=MOST_POINTS).contains(&curve.len()), "{}", curve.len());
        let peaks: Vec<_> = curve.iter().filter(|point| point.1 == 1000).collect();
        assert_eq!(peaks.len(), 1);
        assert!(peaks[0].0 <= SECOND * 54_321 && peaks[0].0 + SECOND * 100 > SECOND * 54_321);
        assert!(curve.iter().all(|point| point.1 == 5 || point.1 == 1000));
    }

    #[test]
    fn a_curve_survives_any_time() {
        let mut meter = Meter::new(true);
        meter.advance(Duration::ZERO);
        meter.set(1);
        meter.advance(Duration::MAX);
        meter.set(2);
        assert!(meter.curve().len() <= MOST_POINTS);
    }
}
