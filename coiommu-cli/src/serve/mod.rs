//! `coiommu serve`: the device for a VMM that is not linked with it, over vfio-user.
//!
//! | file | what it does |
//! | --- | --- |
//! | `mod.rs` | arguments, and one VMM after the other |
//! | `guest.rs` | what a VMM asks for: the device that the guest sees, and its workers |
//! | `ram.rs` | the guest's memory, which comes and goes |
//! | `wait.rs` | waiting for the VMM, for the next one, and for signals |
//! | `passthrough/` | devices of the host, each at a socket of its own |
//! | `watch.rs` | what others may see of the guest that is served |
//! | `control.rs` | the control socket: `docs/control.md` |
//! | `metrics.rs` | Prometheus text |
//! | `http.rs` | how it is asked for |
//! | `limits.rs` | how many files may be open |
//! | `manager.rs` | what the service manager is told |
//! | `logging.rs` | where logs go, and that a guest cannot fill them |

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use coiommu_dtt::Bdf;
use coiommu_pin::pinner::Drain;
use coiommu_pin::{DmaMapper, Policy};
use coiommu_vfio::{SoftIommu, Type1};
use coiommu_vfio_user::{Connection, ConnectionError, Event, Limits, Listener, Request};

pub(crate) mod control;
mod guest;
mod http;
mod limits;
mod logging;
mod manager;
mod metrics;
pub(crate) mod passthrough;
mod ram;
mod wait;
mod watch;

use guest::Guest;
use logging::LogFormat;
use passthrough::{DeviceArgument, Gate, Memory, Passthrough, WithoutDriver};
use wait::{Stop, Woken};
use watch::Watch;

/// Serve a guest the CoIOMMU device, over vfio-user
///
/// A VMM that speaks vfio-user (QEMU 10.1 or newer) connects to the socket and shows the device to its guest, whose
/// driver then counts the DMA of the endpoints that are named here. The guest's memory has to be shared.
///
/// With `--passthrough`, an endpoint is a device of the host, which the guest gets through a socket of its own; what it may
/// reach is what is pinned. An `--endpoint` is a device that the VMM emulates: it reaches everything, whatever is pinned in an
/// IOMMU in software, which is for trying this out.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  coiommu serve --socket /run/vm1.sock --vcpus 4 --endpoint 00:03.0
  coiommu serve --socket /run/vm1.sock --vcpus 4 --endpoint 00:03.0 --endpoint 00:05.0 --persist \\
      --policy extent=run,unpin_policy=lru,unpin_interval=1 --control /run/vm1.ctl --metrics 127.0.0.1:9400

  coiommu serve --socket /run/vm1.sock --vcpus 4 --policy unpin_policy=lru,unpin_interval=1 \\
      --passthrough host=0000:03:00.0,guest=00:05.0,socket=/run/vm1-nvme.sock

QEMU takes, besides its own options, and with one more vfio-user-pci for each device that is passed through, at its address:
  -object memory-backend-memfd,id=ram,size=4G,share=on -machine q35,memory-backend=ram \\
  -device '{\"driver\":\"vfio-user-pci\",\"socket\":{\"path\":\"/run/vm1.sock\",\"type\":\"unix\"},\"addr\":\"08.0\"}'
An endpoint is named as the guest sees it: with addr=03.0 on QEMU's bus 0 it is 00:03.0.

Policy keys: see `coiommu replay --help`, which also tells what a policy would do.

Signals: SIGTERM and SIGINT unpin everything and end it.
Exit codes: 0 the VMM has gone or a signal came, 1 something failed, 2 wrong arguments")]
pub struct Args {
    /// The Unix socket that the VMM connects to; only this user may
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// How many vCPUs the guest can have, hot-plugged ones too
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    vcpus: u16,

    /// A device of the guest whose DMA is tracked, by its address in the guest; may be given many times
    #[arg(long = "endpoint", value_name = "BDF", required_unless_present = "passthrough")]
    endpoints: Vec<Bdf>,

    /// A device of the host to pass through, by its address there (bound to vfio-pci) and in the guest, and the Unix socket
    /// at which the VMM finds it; may be given many times
    #[arg(long, value_name = "host=BDF,guest=BDF,socket=PATH")]
    passthrough: Vec<DeviceArgument>,

    /// What becomes of a guest that starts a device without CoIOMMU's driver, as firmware does
    #[arg(long, value_name = "WHAT", default_value = "pin-all", requires = "passthrough")]
    without_driver: WithoutDriver,

    /// How to pin and unpin: key=value pairs with commas between
    #[arg(long, value_name = "LIST", default_value_t)]
    policy: Policy,

    /// Wait for the next VMM when one has gone, instead of ending
    #[arg(long)]
    persist: bool,

    /// A Unix socket for `coiommu ctl` and `coiommu top`; only this user may connect
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Where Prometheus finds metrics: ADDRESS:PORT, or the path of a Unix socket
    #[arg(long, value_name = "PATH-or-ADDR")]
    metrics: Option<metrics::Place>,

    /// How logs look; RUST_LOG says how much is logged
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,

    /// How many threads pin
    #[arg(long, value_name = "N", default_value = "1")]
    pin_workers: NonZeroUsize,

    /// How long a thread looks for the next request before it sleeps, in microseconds: answers come sooner, a CPU is
    /// busy longer
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 100)]
    #[arg(value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    look: u64,
}

/// What each guest is served with.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) vcpus: usize,
    pub(crate) endpoints: Vec<Bdf>,
    pub(crate) policy: Policy,
    pub(crate) pin_workers: NonZeroUsize,
    pub(crate) look: Duration,
}

impl Config {
    fn new(args: &Args) -> Self {
        Self {
            vcpus: args.vcpus.into(),
            endpoints: args.endpoints.iter().copied().chain(args.passthrough.iter().map(|it| it.guest)).collect(),
            policy: args.policy.clone(),
            pin_workers: args.pin_workers,
            look: Duration::from_micros(args.look),
        }
    }
}

/// Why a VMM is not served any more.
enum Ended {
    /// It has gone.
    Gone,
    /// It was none: somebody has looked whether a server is there, as another server does.
    Nobody,
    /// It is time to end.
    Stopped,
}

/// Serves one VMM, or one after the other.
///
/// # Errors
///
/// A socket cannot be had, the workers cannot be started, the VMM breaks the protocol, or memory stays pinned.
pub fn run(args: &Args) -> anyhow::Result<()> {
    logging::start(args.log_format)?;
    let served = serve_all(args);
    if let (Err(error), LogFormat::Json) = (&served, args.log_format) {
        // Who reads the log finds no line in it that is not JSON.
        tracing::error!("{error:#}");
        process::exit(1);
    }
    served
}

/// What a guest is served through.
#[derive(Debug)]
pub(crate) struct Host {
    /// `None`: what is pinned is kept in an IOMMU in software.
    passthrough: Option<Passthrough>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) memory: Memory,
}

impl Host {
    /// `None`: it was time to end before the devices could be had.
    fn open(args: &Args, stop: &Stop) -> anyhow::Result<Option<Self>> {
        if args.passthrough.is_empty() {
            let gate = Arc::new(Gate::new(args.without_driver, []));
            return Ok(Some(Self { passthrough: None, gate, memory: Memory::default() }));
        }
        let Some(passthrough) = Passthrough::open(&args.passthrough, stop)? else { return Ok(None) };
        let gate = Arc::new(passthrough.gate(args.without_driver));
        Ok(Some(Self { passthrough: Some(passthrough), gate, memory: Memory::default() }))
    }

    /// The container of the devices, if there are some.
    pub(crate) fn container(&self) -> Option<&Arc<Type1>> {
        self.passthrough.as_ref().map(|passthrough| &passthrough.container)
    }

    pub(crate) fn mapper(&self) -> Arc<dyn DmaMapper> {
        match self.container() {
            Some(container) => Arc::clone(container) as _,
            None => Arc::new(SoftIommu::new()),
        }
    }
}

/// Where VMMs connect to.
#[derive(Debug)]
struct Sockets {
    coiommu: Listener,
    /// In the order of the devices that are passed through.
    devices: Vec<Listener>,
}

fn serve_all(args: &Args) -> anyhow::Result<()> {
    let stop = Stop::on_signals().context("cannot catch signals")?;
    let config = Config::new(args);
    limits::raise_open_files();
    let Some(mut host) = Host::open(args, &stop)? else { return Ok(()) };
    // What is wrong with it is found out now, not when a VMM comes.
    new_guest(&config, &host)?.end(Drain::Reset)?;
    let sockets = Sockets { coiommu: Listener::bind(&args.socket)?, devices: passthrough::listen(&args.passthrough)? };
    let watch = Watch::default();
    let _control = args.control.as_deref().map(|path| control::listen(path, &watch)).transpose()?;
    let _metrics = args.metrics.as_ref().map(|place| metrics::listen(place, &watch)).transpose()?;
    tracing::info!("waiting for a VMM at {}", args.socket.display());
    manager::ready();
    loop {
        match (serve_vmm(&config, &host, &sockets, &stop, &watch), args.persist) {
            (Ok(Ended::Gone | Ended::Nobody), true) => tracing::info!("waiting for the next VMM"),
            (Err(error), true) => tracing::error!("{error:#}; waiting for the next VMM"),
            (ended, _) => return ended.map(drop),
        }
        drop(host);
        let Some(next) = Host::open(args, &stop)? else { return Ok(()) };
        host = next;
    }
}

/// Waits for a VMM, and serves it, and all its devices, to its end.
fn serve_vmm(config: &Config, host: &Host, sockets: &Sockets, stop: &Stop, watch: &Watch) -> anyhow::Result<Ended> {
    thread::scope(|scope| {
        let passthrough = host.passthrough.as_ref();
        let _threads = passthrough.map(|it| it.serve(scope, &sockets.devices, &host.gate, &host.memory)).transpose()?;
        while let Some(stream) = wait::for_client(&sockets.coiommu, stop)? {
            let connection = Connection::new(stream, Limits::default());
            match serve(connection, config, host, &sockets.coiommu, stop, watch)? {
                Ended::Nobody => {}
                ended => return Ok(ended),
            }
        }
        Ok(Ended::Stopped)
    })
}

/// A guest, each of whose vCPUs costs file descriptors.
fn new_guest<'a>(config: &Config, host: &'a Host) -> anyhow::Result<Guest<'a>> {
    Guest::new(config, host).map_err(limits::name_open_files)
}

/// Serves a VMM to its end, whatever that is; then nothing is pinned.
fn serve(
    mut connection: Connection,
    config: &Config,
    host: &Host,
    listener: &Listener,
    stop: &Stop,
    watch: &Watch,
) -> anyhow::Result<Ended> {
    let mut guest = new_guest(config, host)?;
    tracing::info!("a VMM has connected");
    let shown = watch.show(guest.served());
    let ended = requests(&mut guest, &mut connection, listener, stop);
    drop(shown);
    let drain = match &ended {
        // The guest is told, for what good it is to it.
        Ok(Ended::Stopped) => Drain::Deactivate,
        // What was its memory may be anything by now.
        Ok(Ended::Gone | Ended::Nobody) | Err(_) => Drain::Reset,
    };
    let drained = guest.end(drain);
    connection.close(Duration::from_secs(1));
    let ended = ended?;
    drained?;
    match ended {
        Ended::Gone => tracing::info!("the VMM has gone; nothing is pinned"),
        Ended::Nobody => tracing::info!("it was no VMM, and has gone without a word"),
        Ended::Stopped => tracing::info!("stopped by a signal; nothing is pinned"),
    }
    Ok(ended)
}

/// What is behind a socket.
trait Serves {
    /// Carries out what the VMM asks for, and answers.
    fn serve(&mut self, connection: &mut Connection, request: Request);
}

/// A guest can keep its VMM writing: after so many looks at the connection there is one at signals and at who else is
/// there.
const TURN: u64 = 64;

/// Carries out what a VMM asks for, until there is nothing more to come.
fn requests(
    device: &mut dyn Serves,
    connection: &mut Connection,
    listener: &Listener,
    stop: &Stop,
) -> anyhow::Result<Ended> {
    let mut looks = 0_u64;
    loop {
        looks += 1;
        if looks.is_multiple_of(TURN) && wait::is_stopped(listener, stop)? {
            return Ok(Ended::Stopped);
        }
        let event = match connection.receive() {
            // As a VMM that is killed may.
            Err(error @ ConnectionError::CutShort) => {
                tracing::warn!("{error}");
                return Ok(Ended::Gone);
            }
            event => event.context("the VMM's connection has ended")?,
        };
        match event {
            Event::Request(request) => device.serve(connection, request),
            Event::Closed => return Ok(if connection.client().is_some() { Ended::Gone } else { Ended::Nobody }),
            Event::More => {}
            Event::Idle => match wait::for_any(connection, listener, stop)? {
                Woken::Stop => return Ok(Ended::Stopped),
                Woken::Connection => {}
            },
        }
    }
}
