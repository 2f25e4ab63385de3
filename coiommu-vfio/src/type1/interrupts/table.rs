//! The eventfds of one kind of interrupt, and what the kernel has to be told when they change.
//!
//! 1. The table is what the kernel has: it changes when the kernel has said yes, and what a failed message took away in the
//!    kernel is given back.
//! 2. Nothing grows by a number that was not compared with how many interrupts there are.

use std::io;

use rustix::io::Errno;

use super::error::{InterruptError, name};
use super::{Action, ERR, InterruptInfo, REQ};
use crate::type1::sys::IrqData;

/// Who is told: the kernel, or a model of it.
pub(super) trait Kernel<F> {
    /// Says what to do, with interrupts from `start` on. A positive number: there are not so many to be had, but that many, and
    /// nothing was done.
    fn send(&self, index: u32, action: Action, start: u32, data: IrqData<'_, F>) -> io::Result<u32>;
}

/// A kind of interrupt.
#[derive(Debug)]
pub(super) struct Table<F> {
    index: u32,
    info: InterruptInfo,
    /// What each signals of those that the kind was enabled with, if it is.
    enabled: Option<Vec<Option<F>>>,
}

impl<F> Table<F> {
    /// A kind that is not enabled.
    pub(super) fn new(index: u32, info: InterruptInfo) -> Self {
        Self { index, info, enabled: None }
    }

    pub(super) fn info(&self) -> InterruptInfo {
        self.info
    }

    /// What each signals of those that the kind is enabled with.
    #[cfg(test)]
    pub(super) fn enabled(&self) -> Option<&[Option<F>]> {
        self.enabled.as_deref()
    }

    /// Gives interrupts their eventfds. If that enables a kind that cannot grow, it is with `wanted` at least.
    pub(super) fn assign(
        &mut self,
        kernel: &impl Kernel<F>,
        wanted: u32,
        start: u32,
        eventfds: Vec<Option<F>>,
    ) -> Result<(), InterruptError> {
        let end = self.end(start, eventfds.len())?;
        let is_fixed = self.info.noresize;
        match &self.enabled {
            None => {
                let least = if is_fixed { wanted.min(self.info.count) as usize } else { 0 };
                self.enable(kernel, end.max(least), start, eventfds)
            }
            Some(enabled) if is_fixed && end > enabled.len() => {
                Err(InterruptError::Fixed { index: self.index, needed: end, enabled: enabled.len() })
            }
            Some(_) => self.update(kernel, start, end, eventfds),
        }
    }

    /// Those that nobody has named yet signal nothing.
    fn enable(
        &mut self,
        kernel: &impl Kernel<F>,
        number: usize,
        start: u32,
        eventfds: Vec<Option<F>>,
    ) -> Result<(), InterruptError> {
        let mut all: Vec<Option<F>> = Vec::with_capacity(number);
        all.resize_with(start as usize, || None);
        all.extend(eventfds);
        all.resize_with(number, || None);
        self.send(kernel, Action::Trigger, 0, IrqData::Eventfds(&borrowed(&all)))?;
        self.enabled = Some(all);
        Ok(())
    }

    fn update(
        &mut self,
        kernel: &impl Kernel<F>,
        start: u32,
        end: usize,
        eventfds: Vec<Option<F>>,
    ) -> Result<(), InterruptError> {
        let sent = self.send(kernel, Action::Trigger, start, IrqData::Eventfds(&borrowed(&eventfds)));
        if sent.is_err() {
            self.give_back(kernel, start, end);
            return sent;
        }
        replace(self.enabled.get_or_insert_default(), start, end, eventfds);
        Ok(())
    }

    /// The kernel takes the eventfds away from those that a message names if it fails in their midst.
    fn give_back(&mut self, kernel: &impl Kernel<F>, start: u32, end: usize) {
        let enabled = self.enabled.as_deref().unwrap_or_default();
        let before: Vec<_> = (start as usize..end).map(|n| enabled.get(n).and_then(Option::as_ref)).collect();
        if let Err(error) = self.send(kernel, Action::Trigger, start, IrqData::Eventfds(&before)) {
            log::error!("interrupts of the kind {} are lost, from {start} up to {end}: {error}", name(self.index));
            let lost = self.enabled.iter_mut().flatten().take(end).skip(start as usize);
            lost.for_each(|slot| *slot = None);
        }
    }

    /// Gives interrupts the eventfds that unmask them. They are closed here: the kernel lets go of one when nobody has it open
    /// any more, and that is how VMMs take one back.
    pub(super) fn assign_unmask(
        &self,
        kernel: &impl Kernel<F>,
        start: u32,
        eventfds: Vec<Option<F>>,
    ) -> Result<(), InterruptError> {
        self.end(start, eventfds.len())?;
        let send = |eventfds: &[Option<&F>]| self.send(kernel, Action::Unmask, start, IrqData::Eventfds(eventfds));
        match send(&borrowed(&eventfds)) {
            // The one before is not let go yet.
            Err(error) if error.errno() == Errno::BUSY.raw_os_error() => {
                send(&vec![None; eventfds.len()])?;
                send(&borrowed(&eventfds))
            }
            sent => sent,
        }
    }

    /// Masks, unmasks or triggers interrupts.
    pub(super) fn act(
        &self,
        kernel: &impl Kernel<F>,
        action: Action,
        start: u32,
        count: u32,
        only: Option<&[bool]>,
    ) -> Result<(), InterruptError> {
        let number = count as usize;
        self.end(start, number)?;
        let data = match only {
            None => IrqData::None(count),
            Some(bools) if bools.len() == number => IrqData::Bools(bools),
            Some(bools) => {
                return Err(InterruptError::Malformed { index: self.index, number, said: bools.len() });
            }
        };
        self.send(kernel, action, start, data)
    }

    /// Disables the kind, if it is enabled.
    pub(super) fn disable(&mut self, kernel: &impl Kernel<F>) -> Result<(), InterruptError> {
        if self.enabled.is_none() {
            return Ok(());
        }
        // These two are not enabled, they have an eventfd or none; the kernel refuses to disable what has none.
        let data = if matches!(self.index, ERR | REQ) { IrqData::Eventfds(&[None]) } else { IrqData::None(0) };
        self.send(kernel, Action::Trigger, 0, data)?;
        self.enabled = None;
        Ok(())
    }

    /// The first interrupt after some that there are.
    fn end(&self, start: u32, number: usize) -> Result<usize, InterruptError> {
        let (index, count) = (self.index, self.info.count);
        if number == 0 {
            return Err(InterruptError::Malformed { index, number, said: 0 });
        }
        let end = (start as usize).checked_add(number).filter(|&end| end <= count as usize);
        end.ok_or(InterruptError::OutOfRange { index, start, number, count })
    }

    fn send(
        &self,
        kernel: &impl Kernel<F>,
        action: Action,
        start: u32,
        data: IrqData<'_, F>,
    ) -> Result<(), InterruptError> {
        let wanted = start as usize + number_in(&data);
        match kernel.send(self.index, action, start, data)? {
            0 => Ok(()),
            available => Err(InterruptError::TooFew { index: self.index, wanted, available }),
        }
    }
}

/// Of how many interrupts something is said.
fn number_in<F>(data: &IrqData<'_, F>) -> usize {
    match *data {
        IrqData::None(count) => count as usize,
        IrqData::Bools(bools) => bools.len(),
        IrqData::Eventfds(eventfds) => eventfds.len(),
    }
}

fn borrowed<F>(eventfds: &[Option<F>]) -> Vec<Option<&F>> {
    eventfds.iter().map(Option::as_ref).collect()
}

/// Puts eventfds from `start` up to `end` into a list that may have to grow for it.
fn replace<F>(list: &mut Vec<Option<F>>, start: u32, end: usize, eventfds: Vec<Option<F>>) {
    if list.len() < end {
        list.resize_with(end, || None);
    }
    list.iter_mut().skip(start as usize).zip(eventfds).for_each(|(slot, eventfd)| *slot = eventfd);
}
