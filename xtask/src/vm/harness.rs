//! Whether test programs were content: what Rust's test harness says.

/// How many tests passed and failed, by the lines in which the harness sums up.
pub(crate) fn sum<'a>(lines: impl IntoIterator<Item = &'a str>) -> (u64, u64) {
    let count = |line: &str, what: &str| -> Option<u64> {
        let before = line.split(what).next()?;
        before.rsplit(' ').next()?.parse().ok()
    };
    let results = lines.into_iter().filter_map(|line| line.strip_prefix("test result: "));
    results.fold((0, 0), |(passed, failed), line| {
        (passed + count(line, " passed;").unwrap_or(0), failed + count(line, " failed;").unwrap_or(0))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_summed_up() {
        let lines = [
            "running 3 tests",
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out; finished in 1.00s",
            "test result: FAILED. 12 passed; 4 failed; 0 ignored; 0 measured; 1 filtered out; finished in 1.00s",
        ];
        assert_eq!(sum(lines), (15, 4));
        assert_eq!(sum(["test result: what is this"]), (0, 0));
        assert_eq!(sum([]), (0, 0));
    }
}
