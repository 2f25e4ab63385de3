//! A device's interrupts: what they signal.
//!
//! Interrupts come in kinds, each with an index: [`INTX`], [`MSI`], [`MSIX`], [`ERR`] and [`REQ`]. The kernel enables a kind
//! with the first eventfds that it is given, and for most with no more interrupts than that, for good; VMMs give eventfds in
//! pieces, and the first piece may well have none. [`Interrupts`] stands between: pieces may come in any order.
//!
//! ```no_run
//! use coiommu_vfio::Type1;
//! use coiommu_vfio::type1::Interrupts;
//! use coiommu_vfio::type1::interrupts::MSIX;
//!
//! # fn eventfd() -> std::os::fd::OwnedFd { unimplemented!() }
//! let container = Type1::open(["0000:03:00.0"])?;
//! let mut interrupts = Interrupts::new(container.devices()[0].clone())?;
//! // As QEMU begins; then what its guest uses, as it comes to it.
//! interrupts.assign(MSIX, 0, vec![None])?;
//! interrupts.assign(MSIX, 4, vec![Some(eventfd()), Some(eventfd())])?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod error;
mod table;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
};

use super::device::{Device, cut_short};
use super::info;
use super::sys::{self, IrqData};
use table::{Kernel, Table};

pub use error::InterruptError;

/// The index of the interrupt pin.
pub const INTX: u32 = 0;
/// The index of the messages of MSI.
pub const MSI: u32 = 1;
/// The index of the messages of MSI-X.
pub const MSIX: u32 = 2;
/// The index of "the device has an error that cannot be corrected".
pub const ERR: u32 = 3;
/// The index of "the host wants the device back".
pub const REQ: u32 = 4;

/// What the kernel says of a kind of interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterruptInfo {
    /// How many of them the device has.
    pub count: u32,
    /// They can signal an eventfd.
    pub eventfd: bool,
    /// They can be masked.
    pub maskable: bool,
    /// One that is signalled is masked with that, until it is unmasked.
    pub automasked: bool,
    /// How many can be used is settled when the first eventfds are assigned.
    pub noresize: bool,
}

/// What can be done to interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Keep them from being signalled.
    Mask,
    /// Let them be signalled again; one that is pending is, at once.
    Unmask,
    /// Signal them, as the device would.
    Trigger,
}

/// The interrupts of a device, and the eventfds that they signal, which it keeps open: a device may have thousands. Nobody else
/// assigns any as long.
///
/// When it is dropped, none signals any more.
#[derive(Debug)]
pub struct Interrupts {
    kernel: Ioctl,
    tables: [Table<OwnedFd>; 5],
}

impl Interrupts {
    /// Of a device, none of whose interrupts signals anything yet.
    ///
    /// # Errors
    ///
    /// The kernel does not say what interrupts there are.
    pub fn new(device: Arc<Device>) -> io::Result<Self> {
        let table = |index| info_of(&device, index).map(|info| Table::new(index, info));
        let tables = [table(INTX)?, table(MSI)?, table(MSIX)?, table(ERR)?, table(REQ)?];
        Ok(Self { kernel: Ioctl(device), tables })
    }

    /// What there is of a kind. Of one that the device has not, there are none.
    #[must_use]
    pub fn info(&self, index: u32) -> InterruptInfo {
        self.table(index).map_or_else(InterruptInfo::default, Table::info)
    }

    /// Gives interrupts from `start` on the eventfds to signal, `None` to signal nothing. With the first, the kind is enabled.
    ///
    /// MSI is enabled with as many messages as were asked for in config space, through [`Device::write`], or as `eventfds`
    /// needs; other kinds that cannot grow with all there are.
    ///
    /// If it fails, everything is as it was before.
    ///
    /// # Errors
    ///
    /// [`InterruptError`]: there are not so many (EINVAL), fewer can be had (ENOSPC), or what the kernel says: another of INTx,
    /// MSI and MSI-X is enabled, or a file is no eventfd (EINVAL).
    pub fn assign(&mut self, index: u32, start: u32, eventfds: Vec<Option<OwnedFd>>) -> Result<(), InterruptError> {
        let wanted = match index {
            // A device spreads its messages over as many as it was told to: all of them have to be there. Over more it must
            // not, as those that have no eventfd would be lost.
            MSI => self.kernel.0.msi_messages(),
            _ => self.info(index).count,
        };
        self.change(index, |table, kernel| table.assign(kernel, wanted, start, eventfds))
    }

    /// Gives interrupts from `start` on the eventfds that unmask them when they are signalled, `None` to have no such. The
    /// kernel has this for [`INTX`] alone, while it is enabled. It keeps an eventfd for as long as somebody has it open, or
    /// until it is given another.
    ///
    /// # Errors
    ///
    /// [`InterruptError`]: as for [`assign`](Self::assign); the kernel says ENOTTY for other kinds.
    pub fn assign_unmask(
        &mut self,
        index: u32,
        start: u32,
        eventfds: Vec<Option<OwnedFd>>,
    ) -> Result<(), InterruptError> {
        self.change(index, |table, kernel| table.assign_unmask(kernel, start, eventfds))
    }

    /// Does something to `count` interrupts from `start` on, or to those of them of which `only` says so.
    ///
    /// # Errors
    ///
    /// [`InterruptError`]: there are not so many, there are none to do it to, or `only` has another length (EINVAL); the kernel
    /// says EINVAL if the kind is not enabled (Linux 6.1: or not with so many), and ENOTTY if it cannot do that to it.
    pub fn act(
        &self,
        index: u32,
        action: Action,
        start: u32,
        count: u32,
        only: Option<&[bool]>,
    ) -> Result<(), InterruptError> {
        let table = self.table(index).ok_or(InterruptError::NoKind { index })?;
        table.act(&self.kernel, action, start, count, only)
    }

    /// Disables a kind: its interrupts signal nothing any more, and their eventfds are let go. There may be none.
    ///
    /// # Errors
    ///
    /// [`InterruptError`], none of which is to be expected.
    pub fn disable(&mut self, index: u32) -> Result<(), InterruptError> {
        self.change(index, Table::disable)
    }

    /// Disables every kind.
    ///
    /// # Errors
    ///
    /// The first there was; the other kinds are disabled all the same.
    pub fn disable_all(&mut self) -> Result<(), InterruptError> {
        let results: Vec<_> = self.tables.iter_mut().map(|table| table.disable(&self.kernel)).collect();
        results.into_iter().collect()
    }

    fn table(&self, index: u32) -> Option<&Table<OwnedFd>> {
        self.tables.get(usize::try_from(index).ok()?)
    }

    fn change(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut Table<OwnedFd>, &Ioctl) -> Result<(), InterruptError>,
    ) -> Result<(), InterruptError> {
        let table = usize::try_from(index).ok().and_then(|index| self.tables.get_mut(index));
        change(table.ok_or(InterruptError::NoKind { index })?, &self.kernel)
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        // A device that is gone signals nothing.
        let _off = self.disable_all();
    }
}

/// A kind that the device has not is empty.
fn info_of(device: &Device, index: u32) -> io::Result<InterruptInfo> {
    match sys::irq_info(device.as_fd(), index) {
        Ok(answer) => info::interrupts(&answer).ok_or_else(cut_short),
        Err(error) if error.errno() == Errno::INVAL.raw_os_error() => Ok(InterruptInfo::default()),
        Err(error) => Err(error.into()),
    }
}

/// The kernel, for one device.
#[derive(Debug)]
struct Ioctl(Arc<Device>);

impl Kernel<OwnedFd> for Ioctl {
    fn send(&self, index: u32, action: Action, start: u32, data: IrqData<'_, OwnedFd>) -> io::Result<u32> {
        let action = match action {
            Action::Mask => VFIO_IRQ_SET_ACTION_MASK,
            Action::Unmask => VFIO_IRQ_SET_ACTION_UNMASK,
            Action::Trigger => VFIO_IRQ_SET_ACTION_TRIGGER,
        };
        Ok(sys::set_irqs(self.0.as_fd(), action, index, start, &data)?)
    }
}
