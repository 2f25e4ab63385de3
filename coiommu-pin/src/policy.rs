//! Policies: what one map call covers, and when pages go.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::time::Duration;

use coiommu_dtt::PAGE_SIZE;

use crate::page_set::BLOCK_PAGES;
use crate::request::PIECE_PAGES;

/// How a pinner pins and unpins. Written as `key=value` pairs with commas between, as in
/// `extent=run,unpin_policy=lru,unpin_interval=1`; what is not named has its default.
///
/// | key | values | default | meaning |
/// | --- | --- | --- | --- |
/// | `extent` | `page`, `run`, `aligned=SIZE` (64k to 2m) | `run` | what one map call covers |
/// | `unpin_policy` | `off`, `lru` | `off` | whether idle pages are taken back over time |
/// | `unpin_interval` | seconds, decimals allowed | `60` | from one tick to the next |
/// | `unpin_limit` | pages, or `none` | `none` | the most pages that one tick takes back |
/// | `unpin_gen_threshold` | rounds | `10` | where only what stays in use was found for so long, look only every so many rounds; 0: look at all, always |
/// | `quota` | bytes (k, m, g, t), or `none` | `none` | the most memory that is pinned at once |
///
/// Names and defaults of the `unpin_` keys are crosvm's.
///
/// ```
/// use coiommu_pin::Policy;
/// let policy: Policy = "unpin_policy=lru,unpin_interval=0.5,quota=1g".parse()?;
/// assert_eq!(
///     policy.to_string(),
///     "extent=run,unpin_policy=lru,unpin_interval=0.5,unpin_limit=none,unpin_gen_threshold=10,quota=1g"
/// );
/// # Ok::<(), coiommu_pin::policy::PolicyError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Policy {
    /// What one map call covers.
    pub extent: ExtentPolicy,
    /// Whether idle pages are taken back over time.
    pub unpin_policy: UnpinPolicy,
    /// From one tick to the next; 0: no ticks.
    pub unpin_interval: Duration,
    /// The most pages that one tick takes back.
    pub unpin_limit: Option<NonZeroU64>,
    /// After so many rounds without a change, a block is looked at only every so many rounds; 0: always.
    pub unpin_gen_threshold: u32,
    /// The most bytes that are pinned at once; of a page that they have in part, none.
    pub quota: Option<u64>,
}

/// What one map call covers: the extent, which is then unmapped whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExtentPolicy {
    /// One page. The finest to take back, and the dearest: VFIO's 65,535 mappings are 256 MiB.
    Page,
    /// Adjacent pages of one request.
    #[default]
    Run,
    /// The aligned piece around a page, at its first touch, as far as it is RAM and not mapped: fewer exits and mappings,
    /// more memory pinned.
    Aligned(AlignedSize),
}

/// A power of two from 64 KiB to 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AlignedSize(u64);

impl AlignedSize {
    /// This many bytes; `None` unless it is a power of two from 64 KiB to 2 MiB.
    #[must_use]
    pub const fn new(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= 64 << 10 && bytes <= 2 << 20 { Some(Self(bytes)) } else { None }
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The size in pages: 16 to 512.
    pub(crate) fn pages(self) -> usize {
        usize::try_from(self.0 / PAGE_SIZE).unwrap_or(BLOCK_PAGES)
    }
}

/// Whether idle pages are taken back over time. They are taken back in any case when room is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnpinPolicy {
    /// They stay.
    #[default]
    Off,
    /// Pages that were idle for a tick's time go.
    Lru,
}

/// Why text is no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// Not `key=value`.
    #[error("{0:?} is not key=value")]
    NotAPair(String),
    /// A key that does not exist.
    #[error(
        "unknown key {0:?}; there are extent, unpin_policy, unpin_interval, unpin_limit, unpin_gen_threshold and quota"
    )]
    UnknownKey(String),
    /// A key for the second time.
    #[error("{0} is given twice")]
    Repeated(&'static str),
    /// A value that the key cannot have.
    #[error("{key}={value}: expected {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// What was given.
        value: String,
        /// What would do.
        expected: &'static str,
    },
}

/// The keys, in the order in which Display gives them.
const KEYS: [&str; 6] = ["extent", "unpin_policy", "unpin_interval", "unpin_limit", "unpin_gen_threshold", "quota"];

impl Default for Policy {
    fn default() -> Self {
        Self {
            extent: ExtentPolicy::Run,
            unpin_policy: UnpinPolicy::Off,
            unpin_interval: Duration::from_secs(60),
            unpin_limit: None,
            unpin_gen_threshold: 10,
            quota: None,
        }
    }
}

impl Policy {
    /// From one tick to the next; `None` if there are no ticks.
    #[must_use]
    pub fn tick_interval(&self) -> Option<Duration> {
        let ticks = self.unpin_policy == UnpinPolicy::Lru && !self.unpin_interval.is_zero();
        ticks.then_some(self.unpin_interval)
    }

    /// The fewest mappings that it can do with, for a guest with so many bytes of RAM: one for each page of a request's piece,
    /// 4,096, in which no two may share one; or for all that may be pinned at once, where that is less. Where there are no
    /// more, room is made.
    #[must_use]
    pub fn mappings_needed(&self, ram: u64) -> u64 {
        let extent = match self.extent {
            ExtentPolicy::Page | ExtentPolicy::Run => PAGE_SIZE,
            ExtentPolicy::Aligned(size) => size.bytes(),
        };
        let pinned = self.quota.map_or(ram, |quota| quota.min(ram));
        pinned.div_ceil(extent).min(PIECE_PAGES as u64)
    }

    /// The most pages that are pinned at once.
    pub(crate) fn quota_pages(&self) -> Option<u64> {
        self.quota.map(|bytes| bytes / PAGE_SIZE)
    }

    fn set(&mut self, key: &'static str, value: &str) -> Option<()> {
        match key {
            "extent" => self.extent = parse_extent(value)?,
            "unpin_policy" => self.unpin_policy = parse_unpin_policy(value)?,
            "unpin_interval" => self.unpin_interval = parse_seconds(value).filter(|interval| !interval.is_zero())?,
            "unpin_limit" => self.unpin_limit = optional(value, |digits| NonZeroU64::new(parse_digits(digits)?))?,
            "unpin_gen_threshold" => self.unpin_gen_threshold = u32::try_from(parse_digits(value)?).ok()?,
            _ => self.quota = optional(value, |bytes| parse_bytes(bytes).filter(|&bytes| bytes >= PAGE_SIZE))?,
        }
        Some(())
    }
}

const fn expected(key: &str) -> &'static str {
    match key.as_bytes() {
        b"extent" => "page, run or aligned=SIZE, SIZE a power of two from 64k to 2m",
        b"unpin_policy" => "off or lru",
        b"unpin_interval" => "seconds above 0, with up to 9 decimals (unpin_policy=off is the way to have no ticks)",
        b"unpin_limit" => "pages above 0, or none",
        b"unpin_gen_threshold" => "rounds, 0 for no generations",
        _ => "bytes, 4k at least, with k, m, g or t for powers of 1024, or none",
    }
}

impl FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let mut policy = Self::default();
        let mut given = [false; KEYS.len()];
        let pairs = text.split(',').filter(|_| !text.is_empty());
        for pair in pairs {
            let (name, value) = pair.split_once('=').ok_or_else(|| PolicyError::NotAPair(pair.to_owned()))?;
            let (&key, given) = KEYS
                .iter()
                .zip(&mut given)
                .find(|(key, _)| **key == name)
                .ok_or_else(|| PolicyError::UnknownKey(name.to_owned()))?;
            if std::mem::replace(given, true) {
                return Err(PolicyError::Repeated(key));
            }
            policy.set(key, value).ok_or_else(|| PolicyError::Value {
                key,
                value: value.to_owned(),
                expected: expected(key),
            })?;
        }
        Ok(policy)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "extent={},unpin_policy={}", self.extent, self.unpin_policy)?;
        write!(f, ",unpin_interval={}", Seconds(self.unpin_interval))?;
        match self.unpin_limit {
            Some(pages) => write!(f, ",unpin_limit={pages}")?,
            None => write!(f, ",unpin_limit=none")?,
        }
        write!(f, ",unpin_gen_threshold={}", self.unpin_gen_threshold)?;
        match self.quota {
            Some(bytes) => write!(f, ",quota={}", Bytes(bytes)),
            None => write!(f, ",quota=none"),
        }
    }
}

impl fmt::Display for ExtentPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Page => f.write_str("page"),
            Self::Run => f.write_str("run"),
            Self::Aligned(size) => write!(f, "aligned={}", Bytes(size.bytes())),
        }
    }
}

impl fmt::Display for UnpinPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Lru => "lru",
        })
    }
}

/// Bytes with the largest letter that loses nothing.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shift, letter) = match self.0.trailing_zeros() {
            _ if self.0 == 0 => (0, ""),
            40.. => (40, "t"),
            30.. => (30, "g"),
            20.. => (20, "m"),
            10.. => (10, "k"),
            _ => (0, ""),
        };
        write!(f, "{}{letter}", self.0 >> shift)
    }
}

/// Seconds with as many decimals as it takes.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}.{:09}", self.0.as_secs(), self.0.subsec_nanos());
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

fn parse_extent(value: &str) -> Option<ExtentPolicy> {
    match value.split_once('=') {
        None if value == "page" => Some(ExtentPolicy::Page),
        None if value == "run" => Some(ExtentPolicy::Run),
        Some(("aligned", size)) => AlignedSize::new(parse_bytes(size)?).map(ExtentPolicy::Aligned),
        _ => None,
    }
}

fn parse_unpin_policy(value: &str) -> Option<UnpinPolicy> {
    match value {
        "off" => Some(UnpinPolicy::Off),
        "lru" => Some(UnpinPolicy::Lru),
        _ => None,
    }
}

/// `none`, or something.
fn optional<T>(value: &str, parse: impl Fn(&str) -> Option<T>) -> Option<Option<T>> {
    if value == "none" { Some(None) } else { parse(value).map(Some) }
}

/// Digits and nothing else.
fn parse_digits(value: &str) -> Option<u64> {
    value.bytes().all(|byte| byte.is_ascii_digit()).then(|| value.parse().ok())?
}

/// A number of bytes, with k, m, g or t (either case) for powers of 1024.
///
/// ```
/// use coiommu_pin::policy::parse_bytes;
/// assert_eq!(parse_bytes("64k"), Some(65_536));
/// assert_eq!(parse_bytes("2G"), Some(2 << 30));
/// assert_eq!(parse_bytes("4 GB"), None);
/// ```
#[must_use]
pub fn parse_bytes(value: &str) -> Option<u64> {
    let shift = match value.bytes().last()?.to_ascii_lowercase() {
        b'k' => 10,
        b'm' => 20,
        b'g' => 30,
        b't' => 40,
        _ => return parse_digits(value),
    };
    let digits = value.get(..value.len() - 1)?;
    parse_digits(digits)?.checked_mul(1 << shift)
}

/// Seconds, with up to nine decimals.
fn parse_seconds(value: &str) -> Option<Duration> {
    let (whole, decimals) = value.split_once('.').unwrap_or((value, "0"));
    if decimals.is_empty() || decimals.len() > 9 {
        return None;
    }
    let nanoseconds = u32::try_from(parse_digits(&format!("{decimals:0<9}"))?).ok()?;
    Some(Duration::new(parse_digits(whole)?, nanoseconds))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policies() -> impl Strategy<Value = Policy> {
        let extent = prop_oneof![
            Just(ExtentPolicy::Page),
            Just(ExtentPolicy::Run),
            (16..=21).prop_map(|bits| ExtentPolicy::Aligned(AlignedSize::new(1_u64 << bits).unwrap())),
        ];
        let interval = (0..=u64::MAX, 1_u32..1_000_000_000).prop_map(|(secs, nanos)| Duration::new(secs, nanos));
        let quota = prop::option::of(prop_oneof![PAGE_SIZE..=u64::MAX, (2_u64..50).prop_map(|bits| PAGE_SIZE << bits)]);
        let unpin = prop_oneof![Just(UnpinPolicy::Off), Just(UnpinPolicy::Lru)];
        (extent, unpin, interval, prop::option::of(1..=u64::MAX), any::<u32>(), quota).prop_map(
            |(extent, unpin_policy, unpin_interval, unpin_limit, unpin_gen_threshold, quota)| Policy {
                extent,
                unpin_policy,
                unpin_interval,
                unpin_limit: unpin_limit.and_then(NonZeroU64::new),
                unpin_gen_threshold,
                quota,
            },
        )
    }

    proptest! {
        #[test]
        fn a_policy_is_itself_again_after_display_and_parse(policy in policies()) {
            let text = policy.to_string();
            let keys: Vec<_> = text.split(',').filter_map(|pair| pair.split('=').next()).collect();
            prop_assert_eq!(keys, KEYS);
            prop_assert_eq!(text.parse(), Ok(policy));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "[a-z_=,.0-9kmgtKé-]{0,60}") {
            let _ = text.parse::<Policy>();
        }
    }

    #[test]
    fn bytes_have_the_largest_letter_that_loses_nothing() {
        let all = [
            (0, "0"),
            (4096, "4k"),
            (12 << 20, "12m"),
            (1 << 30, "1g"),
            (3 << 40, "3t"),
            (1025, "1025"),
            (5 << 10, "5k"),
        ];
        for (bytes, text) in all {
            assert_eq!(Bytes(bytes).to_string(), text);
            assert_eq!(parse_bytes(text), Some(bytes));
        }
    }

    #[test]
    fn there_are_ticks_if_the_policy_and_the_interval_say_so() {
        let interval = |text: &str| text.parse::<Policy>().unwrap().tick_interval();
        assert_eq!(interval("unpin_policy=lru,unpin_interval=2"), Some(Duration::from_secs(2)));
        let never = Policy { unpin_policy: UnpinPolicy::Lru, unpin_interval: Duration::ZERO, ..Policy::default() };
        assert_eq!(never.tick_interval(), None);
        assert_eq!(interval("unpin_policy=off,unpin_interval=2"), None);
    }

    #[test]
    fn mappings_are_needed_for_a_piece_or_for_all() {
        let needed = |text: &str, ram| text.parse::<Policy>().unwrap().mappings_needed(ram);
        assert_eq!(needed("extent=aligned=2m", 128 << 30), 4_096);
        assert_eq!(needed("extent=aligned=2m", 2 << 30), 1_024);
        assert_eq!(needed("extent=aligned=2m,quota=1g", 128 << 30), 512);
        assert_eq!(needed("extent=aligned=64k", (128 << 20) + 1), 2_049);
        assert_eq!(needed("extent=run", 128 << 30), 4_096);
        assert_eq!(needed("extent=page,quota=1m", 128 << 30), 256);
    }

    #[test]
    fn what_is_not_named_has_its_default() {
        assert_eq!("".parse(), Ok(Policy::default()));
        assert_eq!("unpin_interval=60,extent=run".parse(), Ok(Policy::default()));
        assert_eq!(
            Policy::default().to_string(),
            "extent=run,unpin_policy=off,unpin_interval=60,unpin_limit=none,unpin_gen_threshold=10,quota=none"
        );
    }

    #[test]
    fn a_bad_policy_is_refused_and_named() {
        for (text, part) in [
            ("extent", "\"extent\" is not key=value"),
            ("extent=run,", "\"\" is not key=value"),
            ("extend=run", "unknown key \"extend\""),
            ("quota=1g,extent=run,quota=2g", "quota is given twice"),
            ("extent=aligned", "extent=aligned: expected page, run or aligned=SIZE"),
            ("extent=aligned=32k", "aligned=32k"),
            ("extent=aligned=4m", "aligned=4m"),
            ("extent=aligned=96k", "aligned=96k"),
            ("unpin_policy=LRU", "expected off or lru"),
            ("unpin_interval=0", "seconds above 0"),
            ("unpin_interval=0.0000000001", "9 decimals"),
            ("unpin_interval=.5", "unpin_interval=.5"),
            ("unpin_interval=-1", "unpin_interval=-1"),
            ("unpin_interval=1e3", "unpin_interval=1e3"),
            ("unpin_limit=0", "pages above 0"),
            ("unpin_gen_threshold=4294967296", "rounds"),
            ("quota=4095", "4k at least"),
            ("quota=18446744073709551616", "quota="),
            ("quota=16777216t", "quota="),
            ("quota=k", "quota=k"),
            ("quota=1gb", "quota=1gb"),
        ] {
            let error = text.parse::<Policy>().expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
