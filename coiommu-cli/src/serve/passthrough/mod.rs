//! Devices of the host for a guest: each behind a socket of its own, all in one container, whose only mappings are those of
//! what is pinned.
//!
//! | file | what it does |
//! | --- | --- |
//! | `mod.rs` | opens the devices, and serves each to one VMM after the other |
//! | `arguments.rs` | `--passthrough` |
//! | `gate.rs` | who may do DMA: bus mastering is ours to hold |
//! | `pin_all.rs` | the thread that pins all memory for guests without the driver |
//! | `proxy.rs` | one device for the VMM that is connected |
//! | `config.rs` | the bit for bus mastering in accesses to config space |
//! | `memory.rs` | whether the VMM tells all devices of the same memory |

use std::path::Path;
use std::sync::Arc;
use std::thread::{self, Scope};
use std::time::Duration;

use anyhow::{Context as _, bail};
use coiommu_vfio::Type1;
use coiommu_vfio::type1::{Device, OpenError};
use coiommu_vfio_user::{Connection, Limits, Listener};

use super::wait::{self, Signals};
use super::{Ended, requests};

mod arguments;
mod config;
pub(crate) mod gate;
pub(crate) mod memory;
pub(crate) mod pin_all;
mod proxy;

pub(crate) use arguments::DeviceArgument;
pub(crate) use gate::{Gate, WithoutDriver};
pub(crate) use memory::Memory;
use proxy::Proxy;

/// How often it is looked whether devices that are in use are free.
const BUSY: Duration = Duration::from_secs(1);
/// How long a VMM has to take its last answers.
const FAREWELL: Duration = Duration::from_secs(1);

/// The devices that are passed through; none of them does DMA before a guest is there.
#[derive(Debug)]
pub(crate) struct Passthrough {
    /// All of them.
    pub(crate) container: Arc<Type1>,
    devices: Vec<(Arc<Device>, DeviceArgument)>,
}

impl Passthrough {
    /// Opens the devices, in one container. Waits while somebody else has one. `None`: a signal came first.
    pub(crate) fn open(arguments: &[DeviceArgument], signals: &Signals) -> anyhow::Result<Option<Self>> {
        for (at, argument) in arguments.iter().enumerate() {
            if arguments.iter().take(at).any(|other| other.host == argument.host) {
                bail!("{} is passed through twice: name each device once", argument.host);
            }
        }
        let Some(container) = open_when_free(arguments, signals)? else { return Ok(None) };
        let device = |argument: &DeviceArgument| {
            let found = container.devices().iter().find(|device| device.address() == argument.host);
            let found = found.with_context(|| format!("{} is not in its container", argument.host))?;
            Ok((Arc::clone(found), argument.clone()))
        };
        let devices = arguments.iter().map(device).collect::<anyhow::Result<_>>()?;
        Ok(Some(Self { container: Arc::new(container), devices }))
    }

    /// Their gate, closed.
    pub(crate) fn gate(&self, without_driver: WithoutDriver) -> Gate {
        let masters = self.devices.iter().map(|(device, argument)| (Arc::clone(device) as _, argument.guest));
        Gate::new(without_driver, masters)
    }

    /// Their sockets, in the order of the devices.
    pub(crate) fn listen(&self) -> anyhow::Result<Vec<Listener>> {
        self.devices.iter().map(|(_, argument)| Ok(Listener::bind(&argument.socket)?)).collect()
    }

    /// Serves each at its socket, in a thread of its own, until a signal comes.
    pub(crate) fn serve<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        listeners: &'env [Listener],
        gate: &'env Gate,
        memory: &'env Memory,
        signals: &'env Signals,
    ) -> anyhow::Result<()> {
        for (number, ((device, argument), listener)) in self.devices.iter().zip(listeners).enumerate() {
            let serve = move || {
                let mut new = || Proxy::new(Arc::clone(device), number, gate, memory).map_err(Into::into);
                if let Err(error) = serve_device(&mut new, listener, signals) {
                    tracing::error!("{} is not served any more: {error:#}", device.address());
                }
            };
            thread::Builder::new().name(format!("coiommu-{}", argument.guest)).spawn_scoped(scope, serve)?;
            tracing::info!("{} is {} in the guest, at {}", argument.host, argument.guest, argument.socket.display());
        }
        Ok(())
    }
}

/// Opens the devices, once nobody else has them. A VMM that outlives its server still has the devices, and what is pinned
/// for them stays so until it ends.
fn open_when_free(arguments: &[DeviceArgument], signals: &Signals) -> anyhow::Result<Option<Type1>> {
    let mut said = String::new();
    loop {
        match Type1::open(arguments.iter().map(|argument| &argument.host)) {
            Ok(container) => return Ok(Some(container)),
            Err(error @ OpenError::Busy { .. }) => {
                let says = error.to_string();
                if says != said {
                    tracing::warn!("waiting: {says}");
                    said = says;
                }
            }
            Err(error) => return Err(error.into()),
        }
        if wait::for_signal(signals, BUSY)? {
            return Ok(None);
        }
    }
}

/// Serves one device to one VMM after the other.
fn serve_device<'a>(
    new: &mut dyn FnMut() -> anyhow::Result<Proxy<'a>>,
    listener: &Listener,
    signals: &Signals,
) -> anyhow::Result<()> {
    let at = |path: &Path| path.display().to_string();
    while let Some(stream) = wait::for_client(listener, signals)? {
        let mut connection = Connection::new(stream, Limits::default());
        let mut proxy = new().context("the kernel does not tell of its interrupts")?;
        let ended = requests(&mut proxy, &mut connection, listener, signals);
        proxy.end();
        connection.close(FAREWELL);
        match ended {
            Ok(Ended::Stopped) => return Ok(()),
            Ok(Ended::Gone) => tracing::info!("the VMM at {} has gone", at(listener.path())),
            Ok(Ended::Nobody) => {}
            Err(error) => tracing::error!("at {}: {error:#}", at(listener.path())),
        }
    }
    Ok(())
}
