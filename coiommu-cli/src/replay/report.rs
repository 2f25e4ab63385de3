//! The figures of a replay, and their JSON.

use std::time::Duration;

use coiommu_dtt::PAGE_SIZE;
use coiommu_pin::Policy;
use serde::Serialize;

use super::driver::Drivers;
use super::stack::Stack;
use crate::trace::ReadCounts;

/// What a replay found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) trace: TraceFigures,
    pub(super) guest_memory_bytes: u64,
    pub(super) policies: Vec<PolicyFigures>,
    elapsed_seconds: f64,
    /// Nobody said how much RAM there is.
    #[serde(skip)]
    pub(super) memory_is_a_guess: bool,
    /// Scatter lists that the kernel had cut.
    #[serde(skip)]
    pub(super) truncated_lists: u64,
}

/// What the trace holds.
#[derive(Debug, Serialize)]
pub(super) struct TraceFigures {
    pub(super) events: u64,
    pub(super) map_calls: u64,
    pub(super) unmap_calls: u64,
    pub(super) distinct_pages: u64,
    pub(super) peak_mapped_pages: u64,
    pub(super) final_mapped_pages: u64,
    pub(super) unmatched_unmaps: u64,
    pub(super) lost_events: u64,
    pub(super) skipped_lines: u64,
    pub(super) seconds: f64,
}

/// What one policy did.
#[derive(Debug, Serialize)]
pub(super) struct PolicyFigures {
    #[serde(serialize_with = "as_text")]
    pub(super) policy: Policy,
    pub(super) pin_requests: u64,
    pub(super) peak_pinned_pages: u64,
    pub(super) mean_pinned_pages: f64,
    pub(super) final_pinned_pages: u64,
    pub(super) pages_pinned: u64,
    pub(super) pages_unpinned: u64,
    pub(super) iommu_map_calls: u64,
    pub(super) iommu_unmap_calls: u64,
    pub(super) peak_mappings: u64,
    pub(super) failed_pins: u64,
    pub(super) dma_faults: u64,
    /// Pinned pages over time, if asked for.
    #[serde(skip)]
    pub(super) curve: Vec<(Duration, u64)>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn as_text<S: serde::Serializer>(policy: &Policy, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(policy)
}

impl Report {
    /// `memory`: the guest's RAM in bytes, if somebody said.
    pub(super) fn new(memory: Option<u64>, read: ReadCounts, drivers: &Drivers, stacks: Vec<Stack>) -> Self {
        let counts = drivers.counts();
        let guess = drivers.space().highest().max(1).next_multiple_of(1 << 30);
        Self {
            trace: TraceFigures {
                events: counts.events,
                map_calls: counts.map_calls,
                unmap_calls: counts.unmap_calls,
                distinct_pages: counts.distinct_pages,
                peak_mapped_pages: counts.peak_mapped_pages,
                final_mapped_pages: counts.mapped_pages,
                unmatched_unmaps: counts.unmatched_unmaps,
                lost_events: read.lost_events,
                skipped_lines: read.skipped_lines + counts.skipped,
                seconds: drivers.span().as_secs_f64(),
            },
            guest_memory_bytes: memory.unwrap_or(guess),
            policies: stacks.into_iter().map(|stack| PolicyFigures::of(&stack)).collect(),
            elapsed_seconds: 0.0,
            memory_is_a_guess: memory.is_none(),
            truncated_lists: read.truncated_lists,
        }
    }

    pub(super) fn set_elapsed(&mut self, elapsed: Duration) {
        self.elapsed_seconds = elapsed.as_secs_f64();
    }

    /// One JSON object and a line's end.
    ///
    /// # Errors
    ///
    /// None that is known.
    pub(super) fn json(&self) -> serde_json::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// A number of pages as a share of the guest's RAM.
    #[allow(clippy::cast_precision_loss, reason = "a share")]
    pub(super) fn share_of_ram(&self, pages: f64) -> f64 {
        pages * PAGE_SIZE as f64 / self.guest_memory_bytes as f64
    }
}

impl PolicyFigures {
    fn of(stack: &Stack) -> Self {
        let counters = stack.counters();
        Self {
            policy: stack.policy().clone(),
            pin_requests: stack.requests(),
            peak_pinned_pages: stack.pinned().peak(),
            mean_pinned_pages: stack.pinned().mean(),
            final_pinned_pages: stack.pinned().last(),
            pages_pinned: counters.pages_pinned,
            pages_unpinned: counters.pages_unpinned,
            iommu_map_calls: counters.map_calls,
            iommu_unmap_calls: counters.unmap_calls,
            peak_mappings: stack.peak_mappings(),
            failed_pins: stack.failed_pins(),
            dma_faults: stack.faults(),
            curve: stack.pinned().curve(),
        }
    }

    /// The policy in few words: its extents, and what else is not as it would be anyway.
    pub(super) fn label(&self) -> String {
        let default = Policy::default().to_string();
        let rest: Vec<_> = default.split(',').collect();
        let text = self.policy.to_string();
        text.split(',').filter(|pair| pair.starts_with("extent=") || !rest.contains(pair)).collect::<Vec<_>>().join(",")
    }
}
