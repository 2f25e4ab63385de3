//! The address of a PCI device of the host, as people write it.

use std::fmt;
use std::str::FromStr;

/// A PCI device of the host, as /sys names it: `0000:03:00.0`. The domain may be left out if it is 0.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HostBdf(String);

impl HostBdf {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostBdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for HostBdf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse(text).ok_or_else(|| "expected [domain:]bus:device.function in hex, as in 0000:03:00.0".to_owned())
    }
}

fn parse(text: &str) -> Option<HostBdf> {
    let (rest, function) = text.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
    // A domain has more than 16 bits behind some bridges.
    let [domain, bus, device, function] = [(domain, 1 << 32), (bus, 0x100), (device, 0x20), (function, 8)]
        .map(|(digits, limit)| hex_below(digits, limit));
    Some(HostBdf(format!("{:04x}:{:02x}:{:02x}.{:x}", domain?, bus?, device?, function?)))
}

fn hex_below(digits: &str, limit: u64) -> Option<u64> {
    // from_str_radix takes a sign, an address does not.
    let is_hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    u64::from_str_radix(digits, 16).ok().filter(|&number| is_hex && number < limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_written_as_sys_has_it() {
        for (text, wanted) in [
            ("0000:03:00.0", "0000:03:00.0"),
            ("03:00.0", "0000:03:00.0"),
            ("0:3:1f.7", "0000:03:1f.7"),
            ("10000:E1:0A.0", "10000:e1:0a.0"),
            ("00:00.0", "0000:00:00.0"),
        ] {
            assert_eq!(text.parse::<HostBdf>().unwrap().as_str(), wanted);
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "3",
            "03:00",
            "03.0",
            "03:00.8",
            "03:20.0",
            "100:00.0",
            "+3:00.0",
            "x:03:00.0",
            "0:0:0:0.0",
            "../03:00.0",
            "03:00.0 ",
        ] {
            assert!(text.parse::<HostBdf>().is_err(), "{text}");
        }
    }
}
