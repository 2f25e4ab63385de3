//! What the driver says of devices and endpoints that are not as they should be.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use coiommu_dtt::Bdf;
use coiommu_pci::{Bar, ConfigSpace, Device, DeviceConfig, Outcome};
use coiommu_vfio_user::{Connection, DeviceInfo, Errno, Event, IrqInfo, Limits, Listener, RegionInfo, Request, pci};

use super::bed::{Bed, Guest};
use super::files::E1000E;
use super::server::device;
use crate::qemu_test::nothing;
use crate::vm::{Ended, FOLDER};

/// Where the revision is in config space.
const REVISION: usize = 8;

const NOTHING_THERE: &str = "
if modprobe coiommu; then rmmod coiommu; fi
nvme_up
dd if=/dev/nvme0n1 of=/dev/null bs=1M count=4 iflag=direct 2>/dev/null
echo it works without
";

const BOUND: &str = "
nvme_up
net_up e1000e
if modprobe coiommu && [ -e /sys/kernel/debug/coiommu/0000:00:04.0 ]; then echo it is active; exit 1; fi
dd if=/dev/nvme0n1 of=/dev/null bs=1M count=4 iflag=direct 2>/dev/null
rmmod coiommu
coiommu_up rebind=1
await test -b /dev/nvme0n1
cat /sys/kernel/debug/coiommu/*/endpoints
dd if=/dev/nvme0n1 of=/dev/null bs=1M count=4 iflag=direct 2>/dev/null
await grep -q '^pages [1-9]' $stats
echo tracked after all
";

/// Without the device; with one of another revision, one without endpoints; and with endpoints that have their drivers.
pub(super) fn run(bed: &Bed<'_>) -> anyhow::Result<()> {
    let ended = bed.boot(guest(NOTHING_THERE, Vec::new()), &nothing)?;
    expect(bed, &ended, &["coiommu: this machine has no CoIOMMU device"], "no device, and it says so")?;

    let odd = [Odd::start("odd-revision", vec!["00:03.0".parse()?], 0x11)?, Odd::start("odd-empty", Vec::new(), 0x10)?];
    let devices = odd.iter().zip(["06.0", "07.0"]).map(|(odd, address)| device(&odd.path, address)).collect();
    let ended = bed.boot(guest(NOTHING_THERE, devices), &nothing)?;
    let wanted = ["00:06.0: is of revision 0x11; this driver is for revision 0x10", "00:07.0: lists no endpoints"];
    expect(bed, &ended, &wanted, "another revision and no endpoints, and it says so")?;

    let server = bed.serve(&[])?;
    let ended = bed.boot(guest(BOUND, vec![server.device()]), &nothing)?;
    let wanted = [
        "00:03.0: coiommu: nvme is bound already, its DMA is not tracked",
        "not activated: load coiommu before the endpoints' drivers, or with rebind=1",
        "is bound already, its DMA is not tracked: unbinding it",
    ];
    expect(bed, &ended, &wanted, "endpoints that have drivers, and it says so, or rebinds them")
}

fn guest(job: &str, devices: Vec<String>) -> Guest<'_> {
    Guest { job, devices: [devices, vec![E1000E.to_owned()]].concat(), ..Guest::default() }
}

/// The kernel has said all of it.
fn expect(bed: &Bed<'_>, ended: &Ended, wanted: &[&str], good: &str) -> anyhow::Result<()> {
    for wanted in wanted {
        ensure!(ended.console.contains(wanted), "the guest's kernel has not said: {wanted}");
        println!("said: {wanted}");
    }
    bed.judge(ended, &[], good)
}

/// A device that is not as `coiommu serve` would have it; it never comes to be activated.
struct Odd {
    path: String,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Odd {
    fn drop(&mut self) {
        self.is_over.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap_or_else(|_panic| eprintln!("the server of {} ended in a panic", self.path));
        }
    }
}

/// How often a server looks whether it is over.
const LOOK: Duration = Duration::from_millis(20);

impl Odd {
    fn start(name: &str, endpoints: Vec<Bdf>, revision: u8) -> anyhow::Result<Self> {
        let path = Path::new(FOLDER).join(name);
        let listener = Listener::bind(&path)?;
        let mut device = Device::new(&DeviceConfig::new(2, endpoints))?;
        let path = path.to_str().context("the folder's name is not text")?.to_owned();
        let is_over = Arc::new(AtomicBool::new(false));
        let is_over_there = Arc::clone(&is_over);
        let thread = thread::spawn(move || {
            let served = serve(&listener, &mut device, revision, &is_over_there);
            served.unwrap_or_else(|error| eprintln!("{}: {error:#}", listener.path().display()));
        });
        Ok(Self { path, is_over, thread: Some(thread) })
    }
}

/// Serves one emulator after the other, as the kernel may have to be booted again.
fn serve(listener: &Listener, device: &mut Device, revision: u8, is_over: &AtomicBool) -> anyhow::Result<()> {
    while !is_over.load(Relaxed) {
        let Some(stream) = listener.accept()? else {
            thread::sleep(LOOK);
            continue;
        };
        let mut connection = Connection::new(stream, Limits::default());
        while !is_over.load(Relaxed) {
            match connection.receive()? {
                Event::Request(request) => answer(&mut connection, request, device, revision),
                Event::Closed => break,
                Event::More => {}
                Event::Idle => _ = connection.wait(None, Some(LOOK))?,
            }
        }
    }
    Ok(())
}

fn answer(connection: &mut Connection, request: Request, device: &mut Device, revision: u8) {
    match request {
        Request::DeviceInfo(ticket) => connection.answer(ticket, Ok(DeviceInfo::pci(true))),
        Request::RegionInfo(index, ticket) => {
            let info = match (index, bar(index)) {
                (pci::CONFIG_REGION, _) => RegionInfo::trapped(ConfigSpace::BYTES as u64),
                (_, Some(_)) => RegionInfo::trapped(Bar::SIZE),
                (_, None) => RegionInfo::default(),
            };
            connection.answer(ticket, Ok(info));
        }
        Request::IrqInfo(_, ticket) => connection.answer(ticket, Ok(IrqInfo::default())),
        Request::SetIrqs(_, ticket) => connection.answer(ticket, Ok(())),
        Request::DmaMap(_, ticket) => connection.answer(ticket, Ok(())),
        Request::DmaUnmap(_, ticket) => connection.answer(ticket, Ok(())),
        Request::Reset(ticket) => {
            let _nothing_to_do: Outcome = device.reset();
            connection.answer(ticket, Ok(()));
        }
        Request::RegionRead(access, ticket) => {
            let mut data = ticket.buffer();
            match (access.region, bar(access.region), usize::try_from(access.offset)) {
                (pci::CONFIG_REGION, _, Ok(offset)) => {
                    device.read_config(offset, &mut data);
                    if let Some(byte) = REVISION.checked_sub(offset).and_then(|at| data.get_mut(at)) {
                        *byte = revision;
                    }
                }
                (_, Some(bar), _) => device.read_bar(bar, access.offset, &mut data),
                _ => {}
            }
            connection.answer(ticket, Ok(data));
        }
        Request::RegionWrite(write, ticket) => {
            let access = write.access();
            let _nothing_to_do: Outcome = match (access.region, bar(access.region), usize::try_from(access.offset)) {
                (pci::CONFIG_REGION, _, Ok(offset)) => device.write_config(offset, write.data()),
                (_, Some(bar), _) => device.write_bar(bar, access.offset, write.data()),
                _ => Outcome::Nothing,
            };
            connection.answer(ticket, Ok(()));
        }
        Request::RegionIoFds(_, ticket) => connection.answer(ticket, Err(Errno::NOTSUP)),
        // Answered with an error as it is dropped.
        _ => {}
    }
}

fn bar(index: u32) -> Option<Bar> {
    usize::try_from(index).ok().and_then(Bar::from_index)
}
