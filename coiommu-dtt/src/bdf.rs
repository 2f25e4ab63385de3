//! The address of a PCI function in the guest.

use core::fmt;
use core::num::NonZeroU16;
use core::str::FromStr;

/// A guest's PCI bus, device and function number, as a request names its endpoint: `bus << 8 | device << 3 | function`.
///
/// Guests skip BDF 0 as invalid, so it cannot be held.
///
/// ```
/// use coiommu_dtt::Bdf;
/// let nic: Bdf = "00:02.0".parse()?;
/// assert_eq!(nic.raw(), 0x10);
/// assert_eq!(nic.to_string(), "00:02.0");
/// # Ok::<(), coiommu_dtt::bdf::BdfError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf(NonZeroU16);

/// Not a BDF that an endpoint can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the BDF of an endpoint: expected bus:device.function in hex, as in 00:02.0, and not 00:00.0")]
pub struct BdfError;

impl Bdf {
    /// The BDF with this raw value; `None` for 0.
    #[must_use]
    pub const fn new(raw: u16) -> Option<Self> {
        match NonZeroU16::new(raw) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }

    /// The 16 bits that a request holds.
    #[must_use]
    pub const fn raw(self) -> u16 {
        self.0.get()
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let raw = self.raw();
        write!(f, "{:02x}:{:02x}.{:x}", raw >> 8, raw >> 3 & 0x1f, raw & 7)
    }
}

impl FromStr for Bdf {
    type Err = BdfError;

    fn from_str(text: &str) -> Result<Self, BdfError> {
        let (bus, rest) = text.split_once(':').ok_or(BdfError)?;
        let (device, function) = rest.split_once('.').ok_or(BdfError)?;
        let bus = hex_below(bus, 0x100)?;
        let device = hex_below(device, 0x20)?;
        let function = hex_below(function, 8)?;
        Self::new(bus << 8 | device << 3 | function).ok_or(BdfError)
    }
}

fn hex_below(text: &str, limit: u16) -> Result<u16, BdfError> {
    // from_str_radix takes a sign, a BDF does not.
    if text.is_empty() || text.len() > 2 || text.starts_with('+') {
        return Err(BdfError);
    }
    u16::from_str_radix(text, 16).ok().filter(|&value| value < limit).ok_or(BdfError)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::ToString;

    use super::*;

    #[test]
    fn every_bdf_but_zero_is_itself_again_after_display_and_parse() {
        // Miri counts slowly.
        for raw in (1..=u16::MAX).step_by(if cfg!(miri) { 4001 } else { 1 }) {
            let bdf = Bdf::new(raw).unwrap();
            assert_eq!(bdf.to_string().parse(), Ok(bdf));
        }
        assert_eq!(Bdf::new(0), None);
    }

    #[test]
    fn text_that_is_no_bdf_is_refused() {
        for text in [
            "",
            "00:00.0",
            "0:20.0",
            "00:02.8",
            "100:00.0",
            "00:02",
            "02.0",
            "+1:02.0",
            ":02.0",
            "001:02.0",
            "00:02.0 ",
            "0000:00:02.0",
        ] {
            assert_eq!(text.parse::<Bdf>(), Err(BdfError), "{text:?}");
        }
    }
}
