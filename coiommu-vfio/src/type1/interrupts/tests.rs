//! Tables against a plain model of the kernel's rules.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;

use proptest::prelude::*;
use rustix::io::Errno;

use super::table::{Kernel, Table};
use super::{Action, ERR, INTX, InterruptError, InterruptInfo, MSI, MSIX, REQ};
use crate::type1::sys::IrqData;

/// An eventfd, by a number; or a file that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum File {
    Eventfd(u32),
    Other,
}

/// What vfio-pci does, as of Linux 6.12.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Model {
    kinds: [InterruptInfo; 5],
    /// How many messages the host has to give.
    available: u32,
    /// Which of INTx, MSI and MSI-X is enabled, and with how many.
    enabled: Option<(u32, usize)>,
    signals: [BTreeMap<usize, u32>; 5],
    unmask: Option<u32>,
    /// What was signalled.
    signalled: Vec<u32>,
}

impl Model {
    /// Of a device with INTx, 8 messages of MSI and 20 of MSI-X.
    fn new(msix_grows: bool, available: u32) -> Self {
        let kind = |count, noresize| InterruptInfo { count, eventfd: true, noresize, ..InterruptInfo::default() };
        let kinds = [kind(1, false), kind(8, true), kind(20, !msix_grows), kind(1, true), kind(1, true)];
        Self { kinds, available, enabled: None, signals: Default::default(), unmask: None, signalled: Vec::new() }
    }

    fn send(&mut self, index: u32, action: Action, start: u32, data: &IrqData<'_, File>) -> Result<u32, Errno> {
        let (kind, start) = (self.kinds[index as usize], start as usize);
        let number = match data {
            IrqData::None(count) => *count as usize,
            IrqData::Bools(bools) => bools.len(),
            IrqData::Eventfds(files) => files.len(),
        };
        if start >= kind.count as usize || start + number > kind.count as usize {
            return Err(Errno::INVAL);
        }
        match (index, action) {
            (MSI | MSIX, Action::Trigger) => self.trigger_message(index, start, number, data),
            (INTX, Action::Trigger) => self.trigger_pin(number, data),
            (INTX, _) => self.mask_pin(action, number, data),
            (ERR | REQ, Action::Trigger) => self.trigger_single(index as usize, number, data),
            _ => Err(Errno::NOTTY),
        }
    }

    fn is_enabled(&self, index: u32) -> bool {
        self.enabled.is_some_and(|(enabled, _)| enabled == index)
    }

    fn disable(&mut self, index: u32) -> Result<u32, Errno> {
        self.signals[index as usize].clear();
        (self.enabled, self.unmask) = (None, None);
        Ok(0)
    }

    fn trigger_message(
        &mut self,
        index: u32,
        start: usize,
        number: usize,
        data: &IrqData<'_, File>,
    ) -> Result<u32, Errno> {
        match data {
            IrqData::None(0) if self.is_enabled(index) => self.disable(index),
            IrqData::Eventfds(files) if self.is_enabled(index) => self.set_block(index, start, files),
            IrqData::Eventfds(files) if self.enabled.is_none() => {
                if start + number > self.available as usize {
                    return if self.available == 0 { Err(Errno::NOSPC) } else { Ok(self.available) };
                }
                self.enabled = Some((index, start + number));
                let set = self.set_block(index, start, files);
                if set.is_err() {
                    self.disable(index)?;
                }
                set
            }
            _ if !self.is_enabled(index) => Err(Errno::INVAL),
            _ => {
                self.signal(index as usize, start, number, data);
                Ok(0)
            }
        }
    }

    fn set_block(&mut self, index: u32, start: usize, files: &[Option<&File>]) -> Result<u32, Errno> {
        for (at, file) in (start..).zip(files) {
            if let Err(error) = self.set_message(index, at, *file) {
                self.signals[index as usize].retain(|n, _| !(start..=at).contains(n));
                return Err(error);
            }
        }
        Ok(0)
    }

    fn set_message(&mut self, index: u32, at: usize, file: Option<&File>) -> Result<(), Errno> {
        self.signals[index as usize].remove(&at);
        let Some(file) = file else { return Ok(()) };
        let (_, enabled) = self.enabled.unwrap();
        if at >= enabled && self.kinds[index as usize].noresize {
            return Err(Errno::INVAL);
        }
        if at >= self.available as usize {
            return Err(Errno::NOSPC);
        }
        self.signals[index as usize].insert(at, number_of(file)?);
        Ok(())
    }

    fn trigger_pin(&mut self, number: usize, data: &IrqData<'_, File>) -> Result<u32, Errno> {
        let is_enabled = self.is_enabled(INTX);
        match data {
            IrqData::None(0) if is_enabled => self.disable(INTX),
            _ if number != 1 => Err(Errno::INVAL),
            IrqData::Eventfds(files) if is_enabled || self.enabled.is_none() => {
                let eventfd = files[0].map(number_of).transpose()?;
                self.enabled = Some((INTX, 1));
                self.signals[0] = eventfd.map(|eventfd| (0, eventfd)).into_iter().collect();
                Ok(0)
            }
            _ if !is_enabled => Err(Errno::INVAL),
            _ => {
                self.signal(0, 0, 1, data);
                Ok(0)
            }
        }
    }

    fn mask_pin(&mut self, action: Action, number: usize, data: &IrqData<'_, File>) -> Result<u32, Errno> {
        if !self.is_enabled(INTX) || number != 1 {
            return Err(Errno::INVAL);
        }
        match (action, data) {
            (Action::Mask, IrqData::Eventfds(_)) => return Err(Errno::NOTTY),
            (_, IrqData::Eventfds(files)) => match files[0].map(number_of).transpose()? {
                Some(_) if self.unmask.is_some() => return Err(Errno::BUSY),
                eventfd => self.unmask = eventfd,
            },
            _ => {}
        }
        Ok(0)
    }

    fn trigger_single(&mut self, index: usize, number: usize, data: &IrqData<'_, File>) -> Result<u32, Errno> {
        match data {
            IrqData::None(_) if self.signals[index].is_empty() => return Err(Errno::INVAL),
            IrqData::None(0) => self.signals[index].clear(),
            _ if number == 0 => return Err(Errno::INVAL),
            IrqData::Eventfds(files) => {
                let eventfd = files[0].map(number_of).transpose()?;
                self.signals[index] = eventfd.map(|eventfd| (0, eventfd)).into_iter().collect();
            }
            _ => self.signal(index, 0, 1, data),
        }
        Ok(0)
    }

    fn signal(&mut self, index: usize, start: usize, number: usize, data: &IrqData<'_, File>) {
        let is_meant = |at: usize| !matches!(data, IrqData::Bools(bools) if !bools[at - start]);
        let signals = &self.signals[index];
        self.signalled.extend(signals.range(start..start + number).filter(|(at, _)| is_meant(**at)).map(|(_, &fd)| fd));
    }
}

fn number_of(file: &File) -> Result<u32, Errno> {
    match *file {
        File::Eventfd(number) => Ok(number),
        File::Other => Err(Errno::INVAL),
    }
}

/// A device's kinds, and the kernel.
struct Rig {
    tables: Vec<Table<File>>,
    model: RefCell<Model>,
    /// What the kernel says to messages from now on.
    broken: Cell<Option<Errno>>,
    sent: Cell<usize>,
}

impl Kernel<File> for Rig {
    fn send(&self, index: u32, action: Action, start: u32, data: IrqData<'_, File>) -> io::Result<u32> {
        self.sent.set(self.sent.get() + 1);
        if let Some(errno) = self.broken.get() {
            return Err(errno.into());
        }
        Ok(self.model.borrow_mut().send(index, action, start, &data)?)
    }
}

impl Rig {
    fn new(model: Model) -> Self {
        let tables = (0..).zip(model.kinds).map(|(index, info)| Table::new(index, info)).collect();
        Self { tables, model: RefCell::new(model), broken: Cell::new(None), sent: Cell::new(0) }
    }

    fn with<R>(&mut self, index: u32, act: impl FnOnce(&mut Table<File>, &Self) -> R) -> R {
        let mut tables = std::mem::take(&mut self.tables);
        let result = act(&mut tables[index as usize], self);
        self.tables = tables;
        result
    }

    /// As a device with so many messages in its capability for MSI assigns.
    fn assign_of(
        &mut self,
        messages: u32,
        index: u32,
        start: u32,
        files: &[Option<File>],
    ) -> Result<(), InterruptError> {
        let wanted = if index == MSI { messages } else { self.model.borrow().kinds[index as usize].count };
        self.with(index, |table, kernel| table.assign(kernel, wanted, start, files.to_vec()))
    }

    fn assign(&mut self, index: u32, start: u32, files: &[Option<File>]) -> Result<(), InterruptError> {
        self.assign_of(1, index, start, files)
    }

    fn disable(&mut self, index: u32) -> Result<(), InterruptError> {
        self.with(index, Table::disable)
    }

    fn trigger(&mut self, index: u32, start: u32, count: u32) -> Vec<u32> {
        self.with(index, |table, kernel| table.act(kernel, Action::Trigger, start, count, None)).unwrap();
        std::mem::take(&mut self.model.borrow_mut().signalled)
    }

    fn enabled(&self) -> Option<(u32, usize)> {
        self.model.borrow().enabled
    }

    /// What the tables say is what the kernel has.
    fn check(&self) {
        let model = self.model.borrow();
        for (index, table) in (0..).zip(&self.tables) {
            let signals = table.enabled().unwrap_or_default().iter().enumerate();
            let signals: BTreeMap<_, _> =
                signals.filter_map(|(at, file)| Some((at, number_of(file.as_ref()?).unwrap()))).collect();
            assert_eq!(signals, model.signals[index as usize], "kind {index}");
            if index < ERR {
                assert_eq!(table.enabled().is_some(), model.is_enabled(index), "kind {index}");
            }
        }
    }
}

fn fd(number: u32) -> Option<File> {
    Some(File::Eventfd(number))
}

fn fds(numbers: std::ops::Range<u32>) -> Vec<Option<File>> {
    numbers.map(fd).collect()
}

#[test]
fn msix_may_begin_with_nothing_and_come_in_pieces() {
    for grows in [false, true] {
        let mut rig = Rig::new(Model::new(grows, 100));
        // As QEMU does.
        rig.assign(MSIX, 0, &[None]).unwrap();
        assert_eq!(rig.enabled(), Some((MSIX, if grows { 1 } else { 20 })));
        rig.assign(MSIX, 12, &fds(12..20)).unwrap();
        rig.assign(MSIX, 0, &fds(0..12)).unwrap();
        assert_eq!(rig.trigger(MSIX, 0, 20), (0..20).collect::<Vec<_>>());
        rig.assign(MSIX, 3, &[None, fd(40)]).unwrap();
        assert_eq!(rig.trigger(MSIX, 2, 4), [2, 40, 5]);
        rig.disable(MSIX).unwrap();
        rig.check();
    }
}

#[test]
fn msi_has_as_many_messages_as_the_guest_asked_for() {
    let mut rig = Rig::new(Model::new(true, 100));
    rig.assign_of(4, MSI, 0, &fds(0..2)).unwrap();
    assert_eq!(rig.enabled(), Some((MSI, 4)), "not the 8 that there are");
    rig.assign_of(4, MSI, 2, &fds(2..4)).unwrap();
    assert_eq!(rig.trigger(MSI, 0, 4), [0, 1, 2, 3]);
    let error = rig.assign_of(4, MSI, 3, &fds(3..5)).unwrap_err();
    assert!(matches!(error, InterruptError::Fixed { needed: 5, enabled: 4, .. }), "{error}");
    assert_eq!(error.to_string(), "MSI was enabled with 4 interrupts, and has to be disabled before 5 can be used");
    assert_eq!(rig.trigger(MSI, 0, 4), [0, 1, 2, 3]);
    rig.disable(MSI).unwrap();
    // More than the guest asked for, and the other way round.
    rig.assign_of(1, MSI, 0, &fds(0..3)).unwrap();
    assert_eq!(rig.enabled(), Some((MSI, 3)));
    rig.disable(MSI).unwrap();
    rig.assign_of(32, MSI, 0, &fds(0..1)).unwrap();
    assert_eq!(rig.enabled(), Some((MSI, 8)), "there are no 32");
}

#[test]
fn too_few_are_no_success() {
    let mut rig = Rig::new(Model::new(false, 6));
    let error = rig.assign(MSIX, 0, &fds(0..2)).unwrap_err();
    assert!(matches!(error, InterruptError::TooFew { wanted: 20, available: 6, .. }), "{error}");
    assert_eq!(error.to_string(), "the host has 6 interrupts for MSI-X, of 20 that it takes: use fewer");
    assert_eq!(error.errno(), Errno::NOSPC.raw_os_error());
    assert_eq!(io::Error::from(error).raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
    rig.check();
    assert_eq!(rig.enabled(), None);
    rig.assign(MSI, 0, &fds(0..2)).unwrap();
}

#[test]
fn what_is_out_of_range_reaches_no_kernel() {
    let mut rig = Rig::new(Model::new(true, 100));
    for (index, start, number) in
        [(MSIX, 20, 1), (MSIX, 0, 21), (MSIX, u32::MAX, 2), (INTX, 0, 2), (ERR, 1, 1), (MSIX, 0, 0)]
    {
        let error = rig.assign(index, start, &vec![None; number]).unwrap_err();
        assert_eq!(error.errno(), Errno::INVAL.raw_os_error(), "{error}");
        rig.with(index, |table, kernel| table.assign_unmask(kernel, start, vec![None; number])).unwrap_err();
        let number = u32::try_from(number).unwrap();
        rig.with(index, |table, kernel| table.act(kernel, Action::Trigger, start, number, None)).unwrap_err();
    }
    let huge = rig.with(MSIX, |table, kernel| table.act(kernel, Action::Mask, 1, u32::MAX, None)).unwrap_err();
    let text = "4294967295 from 1 on are not among the device's 20 interrupts of the kind MSI-X";
    assert_eq!(huge.to_string(), text);
    assert_eq!(rig.sent.get(), 0);
}

#[test]
fn what_a_failed_message_took_is_given_back() {
    let mut rig = Rig::new(Model::new(true, 100));
    rig.assign(MSIX, 0, &fds(0..4)).unwrap();
    // The kernel would have cleared the first three.
    let error = rig.assign(MSIX, 0, &[fd(10), None, Some(File::Other), fd(13)]).unwrap_err();
    assert_eq!(error.errno(), Errno::INVAL.raw_os_error());
    rig.check();
    assert_eq!(rig.trigger(MSIX, 0, 4), [0, 1, 2, 3]);
    let error = rig.assign(MSIX, 3, &[fd(13), Some(File::Other)]).unwrap_err();
    assert_eq!(error.errno(), Errno::INVAL.raw_os_error());
    rig.check();
    assert_eq!(rig.trigger(MSIX, 0, 4), [0, 1, 2, 3]);
}

#[test]
fn what_cannot_be_given_back_is_not_in_the_table() {
    let mut rig = Rig::new(Model::new(true, 100));
    rig.assign(MSIX, 0, &fds(0..4)).unwrap();
    rig.broken.set(Some(Errno::IO));
    let error = rig.assign(MSIX, 1, &fds(11..13)).unwrap_err();
    assert_eq!(error.errno(), Errno::IO.raw_os_error());
    let signals = rig.tables[MSIX as usize].enabled().unwrap();
    assert_eq!(signals, [fd(0), None, None, fd(3)]);
    // A kind that cannot be disabled stays as it is.
    rig.disable(MSIX).unwrap_err();
    assert!(rig.tables[MSIX as usize].enabled().is_some());
}

#[test]
fn only_one_of_pin_and_messages_is_enabled() {
    let mut rig = Rig::new(Model::new(true, 100));
    rig.assign(INTX, 0, &fds(0..1)).unwrap();
    assert_eq!(rig.assign(MSIX, 0, &fds(0..1)).unwrap_err().errno(), Errno::INVAL.raw_os_error());
    rig.check();
    rig.disable(INTX).unwrap();
    rig.assign(MSIX, 0, &fds(0..1)).unwrap();
}

#[test]
fn a_kind_is_disabled_whether_it_was_enabled_or_not() {
    let mut rig = Rig::new(Model::new(true, 100));
    for index in INTX..=REQ {
        rig.disable(index).unwrap();
        rig.assign(index, 0, &[None]).unwrap();
        rig.disable(index).unwrap();
        rig.assign(index, 0, &fds(7..8)).unwrap();
        assert_eq!(rig.trigger(index, 0, 1), [7]);
        rig.disable(index).unwrap();
        rig.disable(index).unwrap();
        rig.check();
    }
}

#[test]
fn only_those_that_are_meant_are_triggered() {
    let mut rig = Rig::new(Model::new(true, 100));
    rig.assign(MSIX, 0, &fds(0..4)).unwrap();
    let act = |rig: &mut Rig, count, only: &[bool]| {
        rig.with(MSIX, |table, kernel| table.act(kernel, Action::Trigger, 1, count, Some(only)))
    };
    act(&mut rig, 3, &[true, false, true]).unwrap();
    assert_eq!(rig.model.borrow().signalled, [1, 3]);
    let error = act(&mut rig, 3, &[true, false]).unwrap_err();
    assert!(matches!(error, InterruptError::Malformed { number: 3, said: 2, .. }), "{error}");
}

#[test]
fn the_pin_is_unmasked_by_an_eventfd() {
    let mut rig = Rig::new(Model::new(true, 100));
    let assign = |rig: &mut Rig, index, files| rig.with(index, |table, kernel| table.assign_unmask(kernel, 0, files));
    assert_eq!(assign(&mut rig, INTX, fds(5..6)).unwrap_err().errno(), Errno::INVAL.raw_os_error(), "not enabled");
    rig.assign(INTX, 0, &fds(0..1)).unwrap();
    assign(&mut rig, INTX, fds(5..6)).unwrap();
    assert_eq!(rig.model.borrow().unmask, Some(5));
    assign(&mut rig, INTX, fds(6..7)).unwrap();
    assert_eq!(rig.model.borrow().unmask, Some(6), "in the place of the other, which the kernel had still");
    assign(&mut rig, INTX, vec![None]).unwrap();
    assign(&mut rig, INTX, fds(6..7)).unwrap();
    assert_eq!(assign(&mut rig, MSIX, fds(6..7)).unwrap_err().errno(), Errno::NOTTY.raw_os_error());
    rig.check();
    rig.disable(INTX).unwrap();
    rig.check();
}

#[derive(Clone, Debug)]
enum Step {
    Assign { index: u32, start: u32, files: Vec<Option<File>>, messages: u32 },
    AssignUnmask { index: u32, start: u32, files: Vec<Option<File>> },
    Act { index: u32, action: Action, start: u32, count: u32, only: Option<Vec<bool>> },
    Disable { index: u32 },
}

fn files() -> impl Strategy<Value = Vec<Option<File>>> {
    let file = prop_oneof![
        10 => (0..100_u32).prop_map(fd),
        5 => Just(None),
        1 => Just(Some(File::Other)),
    ];
    prop::collection::vec(file, 0..10)
}

fn step() -> impl Strategy<Value = Step> {
    // Mostly one kind, so that something comes of it.
    let index = || prop_oneof![3 => Just(INTX), 3 => Just(MSI), 6 => Just(MSIX), 1 => ERR..=REQ];
    let start = || prop_oneof![9 => 0..20_u32, 1 => prop::sample::select(vec![20, 1 << 31, u32::MAX])];
    let start = move || prop_oneof![Just(0), start()];
    let action = prop::sample::select(vec![Action::Mask, Action::Unmask, Action::Trigger]);
    let only = prop::option::of(prop::collection::vec(any::<bool>(), 0..4));
    prop_oneof![
        12 => (index(), start(), files(), prop::sample::select(vec![1_u32, 2, 4, 8, 32]))
            .prop_map(|(index, start, files, messages)| Step::Assign { index, start, files, messages }),
        2 => (index(), start(), files()).prop_map(|(index, start, files)| Step::AssignUnmask { index, start, files }),
        2 => (index(), action, start(), prop_oneof![0..4_u32, Just(u32::MAX)], only)
            .prop_map(|(index, action, start, count, only)| Step::Act { index, action, start, count, only }),
        3 => index().prop_map(|index| Step::Disable { index }),
    ]
}

impl Rig {
    /// Whether eventfds can be assigned, as somebody would say who knows the rules and the state.
    fn can_assign(&self, messages: u32, index: u32, start: u32, files: &[Option<File>]) -> bool {
        let model = self.model.borrow();
        let kind = model.kinds[index as usize];
        let end = u64::from(start) + files.len() as u64;
        if files.is_empty() || end > kind.count.into() || files.contains(&Some(File::Other)) {
            return false;
        }
        let needed = |wanted: u32| if kind.noresize { end.max(u64::from(wanted.min(kind.count))) } else { end };
        let needed = needed(if index == MSI { messages } else { kind.count });
        match model.enabled {
            _ if matches!(index, ERR | REQ) => true,
            Some((other, _)) if other != index => false,
            None if index == INTX => true,
            None => needed <= model.available.into(),
            Some((_, enabled)) if kind.noresize => end <= enabled as u64,
            // To signal nothing takes no message of the host.
            Some(_) => index == INTX || (start..).zip(files).all(|(at, file)| file.is_none() || at < model.available),
        }
    }

    fn play(&mut self, step: &Step) {
        let before = self.model.borrow().clone();
        let result = match step {
            Step::Assign { index, start, files, messages } => {
                let can = self.can_assign(*messages, *index, *start, files);
                let result = self.assign_of(*messages, *index, *start, files);
                assert_eq!(result.is_ok(), can, "{result:?}");
                if can {
                    let enabled = self.tables[*index as usize].enabled().unwrap();
                    assert_eq!(&enabled[*start as usize..][..files.len()], files);
                }
                result
            }
            Step::AssignUnmask { index, start, files } => {
                let result = self.with(*index, |table, kernel| table.assign_unmask(kernel, *start, files.clone()));
                if result.is_ok() {
                    assert_eq!(self.model.borrow().unmask.map(File::Eventfd), files[0], "the last one counts");
                }
                result
            }
            Step::Act { index, action, start, count, only } => {
                self.with(*index, |table, kernel| table.act(kernel, *action, *start, *count, only.as_deref()))
            }
            Step::Disable { index } => {
                self.disable(*index).unwrap();
                assert!(self.tables[*index as usize].enabled().is_none());
                Ok(())
            }
        };
        self.check();
        if result.is_err() {
            assert_eq!(*self.model.borrow(), before, "{result:?}");
        }
    }
}

proptest! {
    /// Whatever is asked, the tables are what the kernel has; what can be done is done, and what cannot be done changes nothing.
    #[test]
    fn tables_are_what_the_kernel_has(
        grows in any::<bool>(),
        available in prop_oneof![4 => Just(100_u32), 1 => 0..20_u32],
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let mut rig = Rig::new(Model::new(grows, available));
        for step in &steps {
            rig.play(step);
        }
    }
}
