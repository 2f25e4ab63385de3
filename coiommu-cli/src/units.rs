//! Numbers for people, and from people.

use coiommu_pin::policy::parse_bytes;

/// A guest's RAM, as somebody writes it.
pub(crate) fn parse_memory(text: &str) -> Result<u64, String> {
    parse_bytes(text)
        .filter(|&bytes| bytes > 0)
        .ok_or_else(|| "expected bytes above 0, with k, m, g or t for powers of 1024, as in 4g".to_owned())
}

/// Bytes.
#[allow(clippy::cast_precision_loss, reason = "for people")]
pub(crate) fn bytes(bytes: u64) -> String {
    size(bytes as f64)
}

/// Bytes, of which there may be a part.
#[allow(clippy::cast_precision_loss, reason = "for people")]
pub(crate) fn size(bytes: f64) -> String {
    let (unit, name) = [(1_u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")]
        .into_iter()
        .find(|(unit, _)| bytes >= *unit as f64)
        .unwrap_or((1 << 10, "KiB"));
    let value = bytes / unit as f64;
    let decimals = if value >= 99.95 || value == 0.0 { 0 } else { 1 };
    format!("{value:.decimals$} {name}")
}

/// A number with commas.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(
            [0, 7, 999, 1000, 65_535, 1_234_567].map(grouped),
            ["0", "7", "999", "1,000", "65,535", "1,234,567"]
        );
        let sizes = [0.0, 512.0, 4096.0, 99.96 * 1024.0, 1048576.0, 1.5 * 1073741824.0, 1e15];
        assert_eq!(sizes.map(size), ["0 KiB", "0.5 KiB", "4.0 KiB", "100 KiB", "1.0 MiB", "1.5 GiB", "909 TiB"]);
    }
}
