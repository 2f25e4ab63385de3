//! What Prometheus reads: over TCP and a Unix socket, in text that is as OpenMetrics says.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use coiommu_dtt::{Bdf, PAGE_SIZE, RequestWord};
use rustix::process::Signal;

use crate::PATIENCE;
use crate::guest::{Command, Guest, HIGH, LOW};
use crate::server::Server;
use crate::wait_for;

/// A page of metrics: samples by their names with labels, as they are written, and the kinds of their families.
#[derive(Debug)]
struct Page {
    samples: BTreeMap<String, f64>,
    kinds: BTreeMap<String, String>,
}

impl Page {
    /// Reads a page, and sees that it is as <https://prometheus.io/docs/specs/om/open_metrics_spec/> says.
    fn parse(text: &str) -> Self {
        let (mut samples, mut kinds) = (BTreeMap::new(), BTreeMap::new());
        let mut family = String::new();
        let body = text.strip_suffix("# EOF\n").expect("the end");
        for line in body.lines() {
            if let Some(described) = line.strip_prefix("# ") {
                let [what, name, text] = described.splitn(3, ' ').collect::<Vec<_>>().try_into().unwrap();
                if name != family {
                    assert!(!kinds.contains_key(name), "{name} is there twice");
                    family = name.to_owned();
                }
                match what {
                    "TYPE" => assert_eq!(kinds.insert(family.clone(), text.to_owned()), None),
                    "HELP" => assert!(!text.is_empty()),
                    _ => panic!("{line}"),
                }
                continue;
            }
            let (sample, value) = line.rsplit_once(' ').unwrap();
            let name = sample.split('{').next().unwrap();
            let suffix = name.strip_prefix(&family).unwrap_or_else(|| panic!("{name} is not of {family}"));
            let suffixes: &[&str] = match kinds[&family].as_str() {
                "gauge" => &[""],
                "counter" => &["_total"],
                "histogram" => &["_bucket", "_sum", "_count"],
                kind => panic!("{kind}"),
            };
            assert!(suffixes.contains(&suffix), "{line}");
            let value: f64 = value.parse().unwrap();
            assert!(value >= 0.0 && samples.insert(sample.to_owned(), value).is_none(), "{line}");
        }
        Self { samples, kinds }
    }

    #[track_caller]
    fn get(&self, name: &str) -> f64 {
        *self
            .samples
            .get(&format!("coiommu_{name}"))
            .unwrap_or_else(|| panic!("no {name} in {:?}", self.samples.keys()))
    }

    /// The counts of a histogram's buckets, with how far they go.
    fn buckets(&self, name: &str) -> Vec<(f64, f64)> {
        let prefix = format!("coiommu_{name}_bucket{{le=\"");
        let bound = |sample: &str| sample.strip_prefix(&prefix)?.strip_suffix("\"}")?.parse().ok();
        let mut buckets: Vec<(f64, f64)> =
            self.samples.iter().filter_map(|(sample, &count)| Some((bound(sample)?, count))).collect();
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        buckets
    }
}

/// What is answered to a request: head and body.
fn get(mut stream: impl Read + Write, target: &str) -> (String, String) {
    write!(stream, "GET {target} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

fn unix(server: &Server) -> UnixStream {
    let stream = UnixStream::connect(server.path("metrics.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn page(server: &Server) -> Page {
    let (head, body) = get(unix(server), "/metrics");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(head.contains("Content-Type: application/openmetrics-text; version=1.0.0"), "{head}");
    Page::parse(&body)
}

fn start(options: &[&str]) -> Server {
    Server::start(&[&["--metrics", "{}/metrics.sock"], options].concat())
}

#[test]
fn a_server_that_waits_says_so() {
    let server = start(&["--persist"]);
    assert_eq!(page(&server).get("connected"), 0.0);
    let guest = Guest::boot(&server);
    let booted = page(&server);
    assert_eq!((booted.get("connected"), booted.get("active"), booted.get("workers_up")), (1.0, 0.0, 1.0));
    drop(guest);
    server.wait_for_log("waiting for the next VMM", 1);
    assert_eq!(page(&server).samples.len(), 1, "there is no guest to tell of");
    for (target, status) in [("/", "200"), ("/metrics", "200"), ("/favicon.ico", "404")] {
        let (head, _) = get(unix(&server), target);
        assert_eq!(head.split(' ').nth(1), Some(status), "{target}: {head}");
    }
}

#[test]
fn what_a_guest_does_is_counted() {
    let server = start(&[]);
    let mut guest = Guest::boot(&server);
    for _ in 0..3 {
        assert!(!guest.dma_map(0, &HIGH.pages(0..1)), "refused");
    }
    guest.activate();
    assert!(guest.dma_map(0, &HIGH.pages(0..10)) && guest.dma_map(1, &HIGH.pages(20..21)));
    guest.dma_unmap(&HIGH.pages(5..10));
    let mut control = server.control();
    control.unpin(&[(HIGH.gpa, HIGH.bytes)]).unwrap();
    let held = control.unpin(&[(HIGH.gpa + (1 << 20), PAGE_SIZE)]).unwrap();
    assert!(!guest.dma_map(0, &HIGH.pages(256..257)), "failed");
    control.resume(&held["hold"]).unwrap();
    guest.command(Command::Park);
    control.unpin(&[(HIGH.gpa, HIGH.bytes)]).unwrap();

    let page = page(&server);
    for (name, value) in [
        ("connected", 1.0),
        ("active", 1.0),
        ("workers_up", 1.0),
        ("guest_memory_bytes", 8_388_608.0),
        ("pinned_bytes", 11.0 * 4096.0),
        ("mappings", 2.0),
        ("requests_total{result=\"pinned\"}", 2.0),
        ("requests_total{result=\"failed\"}", 1.0),
        ("requests_total{result=\"refused\"}", 3.0),
        ("requests_total{result=\"timed_out\"}", 0.0),
        ("requested_pages_total", 12.0),
        ("pinned_pages_total", 11.0),
        ("unpinned_pages_total{reason=\"idle\"}", 0.0),
        ("unpinned_pages_total{reason=\"room\"}", 0.0),
        ("unpinned_pages_total{reason=\"forced\"}", 0.0),
        ("unpins_total{result=\"granted\"}", 1.0),
        ("unpins_total{result=\"busy\"}", 1.0),
        ("unpins_total{result=\"parked\"}", 1.0),
        ("mapper_calls_total{call=\"map\"}", 2.0),
        ("mapper_failures_total{call=\"map\"}", 0.0),
        ("mapper_failures_total{call=\"unmap\"}", 0.0),
        ("reclaims_total", 0.0),
        ("anomalies_total", 0.0),
        ("request_duration_seconds_count", 6.0),
    ] {
        assert_eq!(page.get(name), value, "{name}");
    }
    assert!(page.get("parked_seconds_total") > 0.0);
    assert_eq!(page.kinds["coiommu_pinned_bytes"], "gauge");
    assert_eq!(page.kinds["coiommu_requests"], "counter");
    assert_eq!(page.kinds["coiommu_request_duration_seconds"], "histogram");
}

#[test]
fn answers_are_measured_from_their_doorbells() {
    let server = start(&["--look", "0"]);
    let mut guest = Guest::active(&server);
    for n in 0..50 {
        assert!(guest.dma_map(0, &HIGH.pages(n..n + 1)));
    }
    // RAM that is away is waited for, up to a second.
    guest.unmap(LOW).unwrap();
    guest.post(0, RequestWord::page(HIGH.page(99), Bdf::new(3 << 3).unwrap()).unwrap());
    guest.ring(0, &[1]);
    guest.wait_for_answer(0);
    let all = wait_for("all answers", || {
        Some(page(&server)).filter(|page| page.get("request_duration_seconds_count") >= 51.0)
    });
    let buckets = all.buckets("request_duration_seconds");
    assert!(buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "each has those before in it: {buckets:?}");
    assert_eq!(buckets.last(), Some(&(f64::INFINITY, 51.0)));
    assert_eq!(buckets.first().map(|bucket| bucket.0), Some(0.000_005));
    let below = |seconds: f64| buckets.iter().find(|bucket| bucket.0 >= seconds).unwrap().1;
    assert!(below(0.1) < 51.0, "one has waited: {buckets:?}");
    let sum = all.get("request_duration_seconds_sum");
    assert!((0.5..51.0 * PATIENCE.as_secs_f64()).contains(&sum), "{sum}");
}

#[test]
fn a_tcp_port_does_as_well() {
    let server = Server::start(&["--metrics", "127.0.0.1:0"]);
    let log = server.log();
    let address = log.split_once("http://").unwrap().1.split_once("/metrics").unwrap().0;
    let connect = || TcpStream::connect(address).unwrap();
    let _guest = Guest::active(&server);
    // Who says nothing keeps nobody else waiting.
    let idle = connect();
    for _ in 0..3 {
        assert_eq!(Page::parse(&get(connect(), "/metrics").1).get("active"), 1.0);
    }
    assert!(get(connect(), "/nothing").0.contains(" 404 "));
    let second = Server::launch(tempfile::tempdir().unwrap(), &["--metrics", address]).end();
    assert!(second.complaint().contains(address), "{}", second.log);
    drop(idle);
}

/// What is answered to a request that is sent as it is.
fn say(server: &Server, request: &[u8]) -> String {
    let mut stream = unix(server);
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn what_is_no_get_is_answered_as_http_says() {
    let server = start(&[]);
    for (request, status) in [
        ("GET /metrics?now HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "200 OK"),
        ("GET /metrics HTTP/1.1\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n".to_owned(), "200 OK"),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc".to_owned(), "405 Method Not Allowed"),
        ("what?\r\n\r\n".to_owned(), "400 Bad Request"),
        (format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "b".repeat(20_000)), "400 Bad Request"),
    ] {
        let answer = say(&server, request.as_bytes());
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{request}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "one answer, and the connection is closed: {answer}");
        assert!(answer.contains("\r\nConnection: close\r\n"), "{answer}");
    }
    let whole = say(&server, b"GET / HTTP/1.1\r\n\r\n");
    let (head, body) = whole.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
    assert_eq!(say(&server, b"HEAD / HTTP/1.1\r\n\r\n"), format!("{head}\r\n\r\n"));
}

#[test]
fn who_says_nothing_or_does_not_listen_keeps_nobody_from_asking() {
    let threads = |server: &Server| std::fs::read_dir(server.proc("task")).unwrap().count();
    let server = start(&["--persist"]);
    let before = threads(&server);
    // One that asks on and on, and takes no answer.
    let mut deaf = unix(&server);
    deaf.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    for _ in 0..1000 {
        if deaf.write_all(&b"GET /metrics HTTP/1.1\r\n\r\n".repeat(100)).is_err() {
            break;
        }
    }
    let idle: Vec<_> = (0..50).map(|_| unix(&server)).collect();
    let mut most = 0;
    let asked = Instant::now();
    wait_for("a page", || {
        most = most.max(threads(&server));
        let mut stream = unix(&server);
        // It may be closed at once.
        write!(stream, "GET / HTTP/1.1\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.ends_with("# EOF\n").then_some(())
    });
    assert!(asked.elapsed() < PATIENCE / 2, "{:?}", asked.elapsed());
    assert!(most <= before + 8, "{most} threads, {before} before");
    let late: Vec<_> = (0..50).map(|_| unix(&server)).collect();
    server.signal(Signal::TERM);
    server.end().assert_well();
    drop((deaf, idle, late));
}
