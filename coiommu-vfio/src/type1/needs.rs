//! Whether a container, and this process, can do what a guest will need: asked at start, as later it fails.

use std::ops::{Range, RangeInclusive};

use coiommu_pin::Limits;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities};

/// What a guest will need of a mapper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Where its RAM is, in guest physical addresses, bytes: iova = gpa.
    pub ram: Vec<Range<u64>>,
    /// The most that will be pinned at once, in bytes.
    pub pinned: u64,
    /// The fewest mappings that the extent policy can do with.
    pub mappings: u64,
}

/// What a guest needs and cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NeedsError {
    /// RAM is where the IOMMU maps nothing.
    #[error(
        "RAM at {:#x} to {:#x} is outside of what this IOMMU maps ({}): give the guest less memory, or a hole there",
        ram.start, ram.end - 1, Ranges(allowed)
    )]
    RamOutside {
        /// The range of RAM.
        ram: Range<u64>,
        /// What can be mapped.
        allowed: Vec<RangeInclusive<u64>>,
    },
    /// This process may not pin as much.
    #[error(
        "{needed} bytes may have to be pinned, and this process may lock {limit} (RLIMIT_MEMLOCK): raise it \
         (`ulimit -l`, LimitMEMLOCK= of a unit), or set a lower quota"
    )]
    Memlock {
        /// In bytes, with what is locked already.
        needed: u64,
        /// In bytes.
        limit: u64,
    },
    /// The container has too few mappings left.
    #[error(
        "{needed} mappings are needed, and {left} are left: raise dma_entry_limit of vfio_iommu_type1 \
         (/sys/module/vfio_iommu_type1/parameters), or take a coarser extent (extent=aligned=2m)"
    )]
    Mappings {
        /// How many are needed.
        needed: u64,
        /// How many there are.
        left: u64,
    },
}

struct Ranges<'a>(&'a [RangeInclusive<u64>]);

impl std::fmt::Display for Ranges<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, range) in self.0.iter().enumerate() {
            write!(f, "{}{:#x} to {:#x}", if n > 0 { ", " } else { "" }, range.start(), range.end())?;
        }
        Ok(())
    }
}

impl Needs {
    /// Whether a mapper with these limits can do it, as far as the mapper goes.
    ///
    /// # Errors
    ///
    /// [`NeedsError::RamOutside`], [`NeedsError::Mappings`].
    pub fn check_limits(&self, limits: &Limits) -> Result<(), NeedsError> {
        let is_inside = |ram: &&Range<u64>| {
            let Some(last) = ram.end.checked_sub(1).filter(|&last| last >= ram.start) else { return true };
            limits.iova_ranges.iter().any(|range| range.contains(&ram.start) && range.contains(&last))
        };
        if let Some(ram) = self.ram.iter().find(|ram| !is_inside(ram)) {
            return Err(NeedsError::RamOutside { ram: ram.clone(), allowed: limits.iova_ranges.clone() });
        }
        match limits.mappings_left {
            Some(left) if left < self.mappings => Err(NeedsError::Mappings { needed: self.mappings, left }),
            _ => Ok(()),
        }
    }

    /// Whether this process may pin as much; its soft limit is raised as far as it takes, where it may be.
    ///
    /// # Errors
    ///
    /// [`NeedsError::Memlock`].
    pub fn allow_pinning(&self) -> Result<(), NeedsError> {
        let Memlock { soft, hard, locked, is_exempt } = Memlock::of_this_process();
        let needed = self.pinned.saturating_add(locked);
        match raised(soft, hard, needed) {
            _ if is_exempt => Ok(()),
            Ok(None) => Ok(()),
            Ok(Some(raised)) => {
                let before = soft.unwrap_or(u64::MAX);
                let raised = setrlimit(Resource::Memlock, Rlimit { current: Some(raised), maximum: hard });
                raised.map_err(|_errno| NeedsError::Memlock { needed, limit: before })
            }
            Err(limit) => Err(NeedsError::Memlock { needed, limit }),
        }
    }
}

/// How much memory a process may lock, pinned memory included: RLIMIT_MEMLOCK, and whether it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memlock {
    /// The soft limit in bytes, which [`Needs::allow_pinning`] raises; `None`: none.
    pub soft: Option<u64>,
    /// How far the soft limit can be raised, in bytes; `None`: to anything.
    pub hard: Option<u64>,
    /// What is locked already, in bytes.
    pub locked: u64,
    /// The kernel does not look at the limit: the process has CAP_IPC_LOCK, and in the first user namespace.
    pub is_exempt: bool,
}

impl Memlock {
    /// That of this process.
    #[must_use]
    pub fn of_this_process() -> Self {
        let has_capability = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
        let is_exempt = has_capability && is_in_first_namespace(&read("/proc/self/uid_map"));
        let Rlimit { current, maximum } = getrlimit(Resource::Memlock);
        Self { soft: current, hard: maximum, locked: locked(), is_exempt }
    }

    /// How much may be pinned beside what is locked, in bytes; `None`: any amount.
    #[must_use]
    pub fn room(&self) -> Option<u64> {
        let limit = if self.is_exempt { None } else { self.soft.and(self.hard) };
        limit.map(|limit| limit.saturating_sub(self.locked))
    }
}

/// What the soft limit has to become; `None`: it will do. Without a number, there is no limit.
fn raised(current: Option<u64>, maximum: Option<u64>, needed: u64) -> Result<Option<u64>, u64> {
    match (current, maximum) {
        (None, _) => Ok(None),
        (Some(current), _) if current >= needed => Ok(None),
        (Some(_), Some(maximum)) if maximum < needed => Err(maximum),
        (Some(_), _) => Ok(Some(needed)),
    }
}

/// Whether capabilities are those of the system, by what /proc/self/uid_map says: in a user namespace (a container without
/// root), VFIO does not count them.
fn is_in_first_namespace(uid_map: &str) -> bool {
    uid_map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// A file of /proc; one that cannot be read says nothing.
fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// What this process has locked, in bytes, as the kernel counts it.
fn locked() -> u64 {
    let status = read("/proc/self/status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pc(mappings_left: u64) -> Limits {
        let iova_ranges = vec![0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff];
        Limits { page_sizes: 0x1000, iova_ranges, mappings_left: Some(mappings_left) }
    }

    fn needs(ram: &[Range<u64>], mappings: u64) -> Needs {
        Needs { ram: ram.to_vec(), pinned: 1 << 30, mappings }
    }

    #[test]
    fn ram_has_to_be_where_the_iommu_maps() {
        let fine = needs(&[0..0xa_0000, 0x10_0000..0x8000_0000, 0x1_0000_0000..0x80_0000_0000], 4);
        fine.check_limits(&pc(4)).unwrap();
        for outside in [0x7f_ffff_f000..0x80_0000_1000, 0xfee0_0000..0xfee0_1000, 0xf000_0000..0x1_0000_0000] {
            let error = needs(&[0..0x1000, outside.clone()], 4).check_limits(&pc(4)).unwrap_err();
            assert!(matches!(&error, NeedsError::RamOutside { ram, .. } if *ram == outside));
        }
        let error = needs(&[0x7f_ffff_f000..0x80_0000_1000], 4).check_limits(&pc(4)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "RAM at 0x7ffffff000 to 0x8000000fff is outside of what this IOMMU maps (0x0 to 0xfedfffff, 0xfef00000 to \
             0x7fffffffff): give the guest less memory, or a hole there"
        );
    }

    #[test]
    fn mappings_have_to_suffice() {
        needs(&[], 4).check_limits(&pc(4)).unwrap();
        assert_eq!(needs(&[], 5).check_limits(&pc(4)), Err(NeedsError::Mappings { needed: 5, left: 4 }));
        needs(&[], 5).check_limits(&Limits { mappings_left: None, ..pc(0) }).unwrap();
    }

    #[test]
    fn there_is_room_up_to_the_hard_limit() {
        let limited = Memlock { soft: Some(8), hard: Some(20), locked: 5, is_exempt: false };
        assert_eq!(limited.room(), Some(15));
        assert_eq!(Memlock { locked: 21, ..limited }.room(), Some(0));
        assert_eq!(Memlock { hard: None, ..limited }.room(), None);
        assert_eq!(Memlock { soft: None, ..limited }.room(), None);
        assert_eq!(Memlock { is_exempt: true, ..limited }.room(), None);
    }

    #[test]
    fn a_user_namespace_is_told_by_its_map() {
        assert!(is_in_first_namespace("         0          0 4294967295\n"));
        assert!(!is_in_first_namespace("         0       1000          1\n         1     100000      65536\n"));
        assert!(!is_in_first_namespace(""));
    }

    #[test]
    fn the_soft_limit_is_raised_as_far_as_it_takes() {
        assert_eq!(raised(None, None, u64::MAX), Ok(None));
        assert_eq!(raised(Some(8), Some(8), 8), Ok(None));
        assert_eq!(raised(Some(8), Some(20), 9), Ok(Some(9)));
        assert_eq!(raised(Some(8), None, 9), Ok(Some(9)));
        assert_eq!(raised(Some(8), Some(20), 21), Err(20));
    }
}
