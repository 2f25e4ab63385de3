//! Metrics in Prometheus' text format, over HTTP.

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context as _;
use coiommu_dtt::PAGE_SIZE;
use coiommu_vfio_user::Listener;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::http::{self, Response};
use super::watch::{Served, Watch};
use crate::control::{All, Passed};

/// Where metrics are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A Unix socket.
    Path(PathBuf),
    /// A TCP port.
    Address(SocketAddr),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        if text.contains('/') {
            return Ok(Self::Path(text.into()));
        }
        Err("neither ADDRESS:PORT, as in 127.0.0.1:9400 or [::1]:9400, nor a path with a /".to_owned())
    }
}

/// A server of metrics, whose path is removed when it is dropped. Who is connected then is so until this process ends.
#[derive(Debug)]
pub(crate) struct Metrics {
    _socket: Option<Listener>,
}

/// Serves metrics of whatever guest is served.
pub(crate) fn listen(place: &Place, watch: &Watch) -> anyhow::Result<Metrics> {
    let watch = watch.clone();
    let answer = move |path: &str| match path {
        "/" | "/metrics" => text(&watch),
        _ => Response::not_found("metrics are at /metrics"),
    };
    let failed = "cannot serve metrics";
    match place {
        Place::Address(address) => {
            let listener = TcpListener::bind(address).with_context(|| format!("cannot serve metrics at {address}"))?;
            // Port 0 is any that is free.
            let address = listener.local_addr().context(failed)?;
            http::serve(move || Ok(listener.accept()?.0), answer).context(failed)?;
            tracing::info!("metrics are at http://{address}/metrics");
            Ok(Metrics { _socket: None })
        }
        Place::Path(path) => {
            let socket = Listener::bind(path)?;
            let listener = UnixListener::from(socket.as_fd().try_clone_to_owned()?);
            listener.set_nonblocking(false)?;
            http::serve(move || Ok(listener.accept()?.0), answer).context(failed)?;
            Ok(Metrics { _socket: Some(socket) })
        }
    }
}

/// The media type of what is served.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

fn text(watch: &Watch) -> Response {
    let mut registry = Registry::with_prefix("coiommu");
    registry.register_collector(Box::new(Guest(watch.served())));
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => Response::ok(OPENMETRICS, text),
        Err(error) => Response::failed(&error.to_string()),
    }
}

/// A guest as metrics, if one is served.
#[derive(Debug)]
struct Guest(Option<Arc<Served>>);

/// The longest that requests of a bucket took, in microseconds.
const BUCKETS: [u64; 12] = [5, 10, 25, 50, 100, 250, 1_000, 5_000, 25_000, 100_000, 1_000_000, 4_000_000];

impl Collector for Guest {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut page = Page(encoder);
        page.gauge("connected", "Whether a VMM is served", u64::from(self.0.is_some()))?;
        self.0.as_ref().map_or(Ok(()), |served| page.guest(served))
    }
}

/// A page of metrics in the making.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn guest(&mut self, served: &Served) -> Result<(), fmt::Error> {
        let service = served.workers.service();
        let pinner = service.pinner();
        let counters = pinner.counters();
        let of = |counter: &AtomicU64| counter.load(Relaxed);
        self.gauge("active", "Whether the guest's driver is active", u64::from(pinner.is_active()))?;
        self.gauge("workers_up", "Whether the workers work", u64::from(service.failure().is_none()))?;
        self.gauge("guest_memory_bytes", "RAM that may be pinned", of(&served.ram))?;
        self.gauge("pinned_bytes", "RAM that is pinned", pinner.pinned_pages().saturating_mul(PAGE_SIZE))?;
        self.gauge("mappings", "Mappings in the IOMMU", pinner.mappings())?;
        self.counters(
            "requests",
            "Pin requests, by what came of them",
            "result",
            &[
                ("pinned", counters.requests_pinned),
                ("failed", counters.requests_failed),
                ("refused", counters.requests_refused),
                ("timed_out", counters.requests_timed_out),
            ],
        )?;
        self.counter("requested_pages", "Pages that requests asked for", counters.pages_asked)?;
        self.counter("pinned_pages", "Pages pinned", counters.pages_pinned)?;
        self.counters(
            "unpinned_pages",
            "Pages unpinned, by why",
            "reason",
            &[
                ("idle", counters.pages_unpinned_idle),
                ("room", counters.pages_unpinned_for_room),
                ("forced", counters.pages_unpinned_forced),
            ],
        )?;
        self.counters(
            "unpins",
            "Ranges that were to be unpinned, by what came of them",
            "result",
            &[
                ("granted", of(&served.unpins.granted)),
                ("busy", of(&served.unpins.busy)),
                ("parked", of(&served.unpins.parked)),
            ],
        )?;
        self.counters(
            "mapper_calls",
            "Calls of the IOMMU, by which",
            "call",
            &[("map", counters.map_calls), ("unmap", counters.unmap_calls)],
        )?;
        self.counters(
            "mapper_failures",
            "Calls of the IOMMU that failed, by which",
            "call",
            &[("map", counters.map_failures), ("unmap", counters.unmap_failures)],
        )?;
        self.counter("reclaims", "Times room was made", counters.reclaims)?;
        self.counter("anomalies", "Times the IOMMU and the books disagreed", counters.anomalies)?;
        self.seconds("parked", "Time that the guest had unpinning parked", served.parked.time().as_secs_f64())?;
        let (all, passed) = served.gate.passed();
        self.gauge(
            "all_memory_pinned",
            "Whether all RAM is pinned, for devices that are started without the guest's driver",
            u64::from(all == All::Pinned),
        )?;
        if !passed.is_empty() {
            self.bus_masters(&passed)?;
        }
        self.latency(served)
    }

    fn bus_masters(&mut self, passed: &[Passed]) -> Result<(), fmt::Error> {
        let help = "Whether a device that is passed through may do DMA";
        let mut family = self.0.encode_descriptor("bus_master", help, None, MetricType::Gauge)?;
        for Passed { host, guest, bus_master, .. } in passed {
            let labels = [("host", host.as_str()), ("guest", guest.as_str())];
            ConstGauge::new(i64::from(*bus_master)).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> Result<(), fmt::Error> {
        let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        gauge.encode(self.0.encode_descriptor(name, help, None, MetricType::Gauge)?)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> Result<(), fmt::Error> {
        let counter = ConstCounter::new(value);
        counter.encode(self.0.encode_descriptor(name, help, None, MetricType::Counter)?)
    }

    fn seconds(&mut self, name: &str, help: &str, value: f64) -> Result<(), fmt::Error> {
        let name = format!("{name}_seconds");
        ConstCounter::new(value).encode(self.0.encode_descriptor(&name, help, None, MetricType::Counter)?)
    }

    fn counters(&mut self, name: &str, help: &str, label: &str, values: &[(&str, u64)]) -> Result<(), fmt::Error> {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for &(value, count) in values {
            ConstCounter::new(count).encode(family.encode_family(&[(label, value)])?)?;
        }
        Ok(())
    }

    fn latency(&mut self, served: &Served) -> Result<(), fmt::Error> {
        let latency = served.workers.service().doorbell_latency();
        let mut below = 0;
        let mut buckets = Vec::with_capacity(BUCKETS.len() + 1);
        for micros in BUCKETS {
            let count = latency.count_between(0, micros);
            buckets.push((Duration::from_micros(micros).as_secs_f64(), count - below));
            below = count;
        }
        buckets.push((f64::INFINITY, latency.len() - below));
        #[allow(clippy::cast_precision_loss, reason = "it is a sum of times that were rounded")]
        let sum = latency.mean() * latency.len() as f64 / 1e6;
        let mut metric = self.0.encode_descriptor(
            "request_duration_seconds",
            "Time from a doorbell to its answer",
            None,
            MetricType::Histogram,
        )?;
        metric.encode_histogram::<NoLabelSet>(sum, latency.len(), &buckets, None)
    }
}
