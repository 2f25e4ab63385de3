//! The contract notices mappers that break it: each flaw here, in a mapper that is sound otherwise, fails a case.

// Mapping memory is unsafe; flawed mappers pass on what they were promised.
#![allow(unsafe_code)]

mod soft_bed;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use coiommu_pin::contract::CASES;
use coiommu_vfio::{Access, Backing, DmaMapper, Limits, MapError, SoftIommu};

use soft_bed::SoftBed;

const PAGE: u64 = 4096;

/// What a map call asks for.
#[derive(Clone, Copy)]
struct Ask<'a> {
    iova: u64,
    backing: Backing<'a>,
    len: u64,
}

impl Ask<'_> {
    fn map(self, iommu: &SoftIommu) -> Result<(), MapError> {
        // SAFETY: a flaw hands on memory of the bed only, or what the case itself made up.
        unsafe { iommu.map(self.iova, self.backing, self.len) }
    }

    /// The page `n` pages on.
    fn page(self, n: u64) -> Self {
        let offset = usize::try_from(n * PAGE).unwrap();
        let hva = self.backing.hva.map_addr(|hva| hva.checked_add(offset).unwrap());
        Self { iova: self.iova + n * PAGE, backing: Backing { hva, file: None }, len: PAGE }
    }
}

#[derive(Clone, Copy)]
struct Flaw {
    what: &'static str,
    /// One of the cases that must notice.
    case: &'static str,
    map: fn(&SoftIommu, Ask<'_>) -> Result<(), MapError>,
    unmap: fn(&SoftIommu, u64, u64) -> Result<u64, MapError>,
    limits: fn(&SoftIommu) -> Limits,
}

const SOUND: Flaw = Flaw {
    what: "none",
    case: "none",
    map: |iommu, ask| ask.map(iommu),
    unmap: |iommu, iova, len| iommu.unmap(iova, len),
    limits: |iommu| iommu.limits(),
};

const FLAWS: &[Flaw] = &[
    Flaw { what: "maps nothing", case: "map::makes_every_byte_reachable", map: |_, _| Ok(()), ..SOUND },
    Flaw {
        what: "maps the neighbouring memory",
        case: "map::reaches_the_backing_it_was_given",
        map: |iommu, ask| {
            let hva = ask.backing.hva.map_addr(|hva| (hva.get() ^ 4096).try_into().unwrap());
            Ask { backing: Backing { hva, file: None }, ..ask }.map(iommu)
        },
        ..SOUND
    },
    Flaw {
        what: "takes an overlap for success",
        case: "map::refuses_any_overlap",
        map: |iommu, ask| ask.map(iommu).or_else(|error| if error == MapError::Exists { Ok(()) } else { Err(error) }),
        ..SOUND
    },
    Flaw {
        what: "looks for an overlap at the first page only",
        case: "map::refuses_any_overlap",
        map: |iommu, ask| match ask.map(iommu) {
            Err(MapError::Exists) if !iommu.is_mapped(ask.iova, 1) => ask.page(0).map(iommu),
            result => result,
        },
        ..SOUND
    },
    Flaw {
        what: "leaves a half behind when it fails",
        case: "map::refuses_any_overlap",
        map: |iommu, ask| {
            let result = ask.map(iommu);
            if result == Err(MapError::Exists) {
                let _ = ask.page(0).map(iommu);
            }
            result
        },
        ..SOUND
    },
    Flaw {
        what: "makes a mapping of each page",
        case: "limits::count_a_big_mapping_once",
        map: |iommu, ask| match ask.len % PAGE {
            0 if (1..1 << 30).contains(&ask.len) => (0..ask.len / PAGE).try_for_each(|n| ask.page(n).map(iommu)),
            _ => ask.map(iommu),
        },
        ..SOUND
    },
    Flaw {
        what: "refuses memory that is mapped already",
        case: "map::takes_the_same_memory_twice",
        map: |iommu, ask| {
            let hvas = iommu.snapshot().into_iter().map(|(iova, _)| iommu.translate(iova, Access::Read));
            let twice = hvas.into_iter().any(|found| found.is_ok_and(|found| found.hva == ask.backing.hva));
            if twice { Err(MapError::Exists) } else { ask.map(iommu) }
        },
        ..SOUND
    },
    Flaw {
        what: "rounds sizes up",
        case: "map::refuses_what_is_not_pages",
        map: |iommu, ask| {
            let len = ask.len.checked_next_multiple_of(PAGE).unwrap_or(ask.len);
            Ask { len, ..ask }.map(iommu)
        },
        ..SOUND
    },
    Flaw {
        what: "says `Invalid` for all that fails",
        case: "map::refuses_memory_that_is_not_there",
        map: |iommu, ask| ask.map(iommu).map_err(|_| MapError::Invalid),
        ..SOUND
    },
    Flaw {
        what: "takes a shortage of mappings for one of memory",
        case: "limits::end_in_no_entries_and_recover",
        map: |iommu, ask| {
            ask.map(iommu).map_err(|error| if error == MapError::NoEntries { MapError::NoMemory } else { error })
        },
        ..SOUND
    },
    Flaw {
        what: "does not unmap",
        case: "unmap::ends_access",
        unmap: |iommu, iova, len| Ok(iommu.mapped_bytes_in(iova, len)),
        ..SOUND
    },
    Flaw {
        what: "takes an unmap of nothing for an error",
        case: "unmap::of_a_hole_is_no_error",
        unmap: |iommu, iova, len| match iommu.unmap(iova, len) {
            Ok(0) => Err(MapError::Invalid),
            result => result,
        },
        ..SOUND
    },
    Flaw {
        what: "returns the bytes asked for",
        case: "unmap::covers_mappings_and_holes",
        unmap: |iommu, iova, len| iommu.unmap(iova, len).map(|_| len),
        ..SOUND
    },
    Flaw {
        what: "unmaps the first mapping only",
        case: "unmap::covers_mappings_and_holes",
        unmap: |iommu, iova, len| {
            let first =
                iommu.snapshot().into_iter().find(|(start, _)| (iova..iova.saturating_add(len)).contains(start));
            first.map_or(Ok(0), |(iova, len)| iommu.unmap(iova, len))
        },
        ..SOUND
    },
    Flaw {
        what: "unmaps all that a range touches",
        case: "unmap::never_cuts",
        unmap: |iommu, iova, len| {
            let touched = |&(start, bytes): &(u64, u64)| start < iova.saturating_add(len) && iova < start + bytes;
            iommu.snapshot().into_iter().filter(touched).map(|(iova, len)| iommu.unmap(iova, len)).sum()
        },
        ..SOUND
    },
    Flaw {
        what: "leaves alone what it would cut, and unmaps the rest",
        case: "unmap::never_cuts",
        unmap: |iommu, iova, len| {
            let covered = |&(start, bytes): &(u64, u64)| iova <= start && start + bytes <= iova.saturating_add(len);
            iommu.unmap(iova, len).inspect_err(|_| {
                let snapshot = iommu.snapshot();
                let _: u64 = snapshot.into_iter().filter(covered).flat_map(|(iova, len)| iommu.unmap(iova, len)).sum();
            })
        },
        ..SOUND
    },
    Flaw {
        what: "takes an unmap of no bytes for success",
        case: "unmap::refuses_what_is_not_pages",
        unmap: |iommu, iova, len| if len == 0 { Ok(0) } else { iommu.unmap(iova, len) },
        ..SOUND
    },
    Flaw {
        what: "never says that mappings were used",
        case: "limits::count_every_mapping",
        limits: |iommu| Limits { mappings_left: Some(65_535), ..iommu.limits() },
        ..SOUND
    },
    Flaw {
        what: "unmaps after it has returned",
        case: "threads::see_no_access_after_unmap",
        // As far as the device is concerned: it stays mapped until the next map.
        map: |iommu, ask| {
            iommu.unmap(ask.iova, ask.len)?;
            ask.map(iommu)
        },
        unmap: |iommu, iova, len| Ok(iommu.mapped_bytes_in(iova, len)),
        ..SOUND
    },
    Flaw {
        what: "lets both racers win",
        case: "threads::that_race_have_one_winner",
        map: |iommu, ask| ask.map(iommu).or(Ok(())),
        ..SOUND
    },
    Flaw {
        what: "takes a neighbour for an overlap",
        case: "map::takes_neighbours",
        map: |iommu, ask| {
            let touches = iommu.is_mapped(ask.iova.wrapping_sub(1), 1) || iommu.is_mapped(ask.iova + ask.len, 1);
            if touches { Err(MapError::Exists) } else { ask.map(iommu) }
        },
        ..SOUND
    },
    Flaw {
        what: "looks at the first page only for the iova ranges",
        case: "map::refuses_iovas_outside_the_ranges",
        map: |iommu, ask| match ask.map(iommu) {
            Err(MapError::Invalid) if ask.page(0).map(iommu).is_ok() => Ok(()),
            result => result,
        },
        ..SOUND
    },
    Flaw {
        what: "does not forget a mapping",
        case: "unmap::makes_room_to_map_again",
        map: |iommu, ask| {
            let forgotten = iommu.calls().unmap > 0 && iommu.mappings() == 0;
            if forgotten { Err(MapError::Exists) } else { ask.map(iommu) }
        },
        ..SOUND
    },
    Flaw {
        what: "lists its iova ranges in no order",
        case: "limits::are_sane",
        limits: |iommu| {
            let mut limits = iommu.limits();
            limits.iova_ranges.reverse();
            limits
        },
        ..SOUND
    },
    Flaw {
        what: "takes what others have mapped away too",
        case: "threads::keep_out_of_each_others_ranges",
        unmap: |iommu, iova, len| {
            let bytes = iommu.unmap(iova, len)?;
            let others = iommu.snapshot();
            others.into_iter().try_for_each(|(iova, len)| iommu.unmap(iova, len).map(drop))?;
            Ok(bytes)
        },
        ..SOUND
    },
];

struct Flawed {
    iommu: Arc<SoftIommu>,
    flaw: Flaw,
}

impl std::fmt::Debug for Flawed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.flaw.what)
    }
}

impl DmaMapper for Flawed {
    unsafe fn map(&self, iova: u64, backing: Backing<'_>, len: u64) -> Result<(), MapError> {
        (self.flaw.map)(&self.iommu, Ask { iova, backing, len })
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<u64, MapError> {
        (self.flaw.unmap)(&self.iommu, iova, len)
    }

    fn limits(&self) -> Limits {
        (self.flaw.limits)(&self.iommu)
    }
}

fn notices(case: &str, flaw: Flaw) -> bool {
    let case = CASES.iter().find(|known| known.name == case).unwrap_or_else(|| panic!("no case {case}"));
    let bed = SoftBed::new(move |iommu| Arc::new(Flawed { iommu, flaw }));
    catch_unwind(AssertUnwindSafe(|| (case.run)(&bed).unwrap())).is_err()
}

#[test]
fn a_case_notices_each_flaw() {
    for flaw in FLAWS {
        assert!(notices(flaw.case, *flaw), "{} does not notice a mapper that {}", flaw.case, flaw.what);
    }
}

#[test]
fn no_case_finds_fault_with_a_sound_mapper() {
    for case in CASES {
        assert!(!notices(case.name, SOUND), "{} finds fault", case.name);
    }
}

#[test]
fn each_case_has_a_flaw_to_notice() {
    let idle: Vec<_> = CASES.iter().filter(|case| FLAWS.iter().all(|flaw| flaw.case != case.name)).collect();
    assert!(idle.is_empty(), "no flaw shows that these are good for anything: {idle:?}");
}
