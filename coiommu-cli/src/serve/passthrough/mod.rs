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

use super::wait::{self, Stop};
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
const BUSY: Duration = Duration::from_millis(200);
/// How long a VMM has to take its last answers.
const FAREWELL: Duration = Duration::from_secs(1);

/// The devices that are passed through, for one guest: for the next they are opened anew, once nobody has them any more, so that
/// nothing of the one reaches the other. None of them does DMA before a guest is there.
#[derive(Debug)]
pub(crate) struct Passthrough {
    /// All of them.
    pub(crate) container: Arc<Type1>,
    devices: Vec<(Arc<Device>, DeviceArgument)>,
    /// For the threads that serve them.
    stop: Stop,
}

/// The threads that serve devices: they end when this is dropped.
#[must_use = "they end when it is dropped"]
#[derive(Debug)]
pub(crate) struct Threads<'a>(&'a Stop);

impl Drop for Threads<'_> {
    fn drop(&mut self) {
        self.0.raise();
    }
}

impl Passthrough {
    /// Opens the devices, in one container. Waits while somebody else has one. `None`: it is time to end.
    pub(crate) fn open(arguments: &[DeviceArgument], stop: &Stop) -> anyhow::Result<Option<Self>> {
        for (at, argument) in arguments.iter().enumerate() {
            if arguments.iter().take(at).any(|other| other.host == argument.host) {
                bail!("{} is passed through twice: name each device once", argument.host);
            }
        }
        let Some(container) = open_when_free(arguments, stop)? else { return Ok(None) };
        let device = |argument: &DeviceArgument| {
            let found = container.devices().iter().find(|device| device.address() == argument.host.as_str());
            let found = found.with_context(|| format!("{} is not in its container", argument.host))?;
            Ok((Arc::clone(found), argument.clone()))
        };
        let devices = arguments.iter().map(device).collect::<anyhow::Result<_>>()?;
        let stop = Stop::new().context("cannot make a socket")?;
        Ok(Some(Self { container: Arc::new(container), devices, stop }))
    }

    /// Their gate, closed.
    pub(crate) fn gate(&self, without_driver: WithoutDriver) -> Gate {
        let masters = self.devices.iter().map(|(device, argument)| (Arc::clone(device) as _, argument.guest));
        Gate::new(without_driver, masters)
    }

    /// Serves each at its socket, in a thread of its own, until what this returns is dropped.
    pub(crate) fn serve<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        listeners: &'env [Listener],
        gate: &'env Gate,
        memory: &'env Memory,
    ) -> anyhow::Result<Threads<'env>> {
        // However this ends, so do those that were started.
        let threads = Threads(&self.stop);
        for (number, ((device, argument), listener)) in self.devices.iter().zip(listeners).enumerate() {
            let serve = move || {
                let mut new = || Proxy::new(Arc::clone(device), number, gate, memory).map_err(Into::into);
                if let Err(error) = serve_device(&mut new, listener, &self.stop) {
                    tracing::error!("{} is not served any more: {error:#}", device.address());
                }
            };
            thread::Builder::new().name(format!("coiommu-{}", argument.guest)).spawn_scoped(scope, serve)?;
            tracing::debug!("{} is {} in the guest, at {}", argument.host, argument.guest, argument.socket.display());
        }
        Ok(threads)
    }
}

/// The sockets of devices, in their order.
pub(crate) fn listen(arguments: &[DeviceArgument]) -> anyhow::Result<Vec<Listener>> {
    arguments.iter().map(|argument| Ok(Listener::bind(&argument.socket)?)).collect()
}

/// Opens the devices, once nobody else has them. A VMM that outlives its server still has the devices, and what is pinned
/// for them stays so until it ends.
fn open_when_free(arguments: &[DeviceArgument], stop: &Stop) -> anyhow::Result<Option<Type1>> {
    let mut said = String::new();
    loop {
        match Type1::open(arguments.iter().map(|argument| argument.host.as_str())) {
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
        if wait::for_stop(stop, BUSY)? {
            return Ok(None);
        }
    }
}

/// Serves one device to one VMM after the other.
fn serve_device<'a>(
    new: &mut dyn FnMut() -> anyhow::Result<Proxy<'a>>,
    listener: &Listener,
    stop: &Stop,
) -> anyhow::Result<()> {
    let at = |path: &Path| path.display().to_string();
    while let Some(stream) = wait::for_client(listener, stop)? {
        let mut proxy = match new() {
            Ok(proxy) => proxy,
            Err(error) => {
                tracing::error!(
                    "at {}: the kernel does not tell of the device's interrupts: {error:#}",
                    at(listener.path())
                );
                continue;
            }
        };
        let mut connection = Connection::new(stream, Limits::default());
        let ended = requests(&mut proxy, &mut connection, listener, stop);
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
