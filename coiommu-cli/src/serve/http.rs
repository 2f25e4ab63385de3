//! As much of HTTP/1.1 as who reads metrics needs: one request a connection, and its answer.
//!
//! A client costs a thread, for a few seconds at most, and there are only so many at once.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

/// How many may be connected at once; others are closed.
const CONNECTIONS: usize = 8;
/// How long a request's head may be, and how many fields it may have.
const HEAD: usize = 8 << 10;
const FIELDS: usize = 64;
/// How long a client may take to send its request, and then to take the answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// What a client sends after its request's head is not looked at; so much of it is taken.
const REST: u64 = 64 << 10;

/// An answer.
#[derive(Debug)]
pub(crate) struct Response {
    /// The status code, with its phrase.
    status: &'static str,
    /// A media type.
    kind: &'static str,
    body: String,
}

impl Response {
    pub(crate) fn ok(kind: &'static str, body: String) -> Self {
        Self { status: "200 OK", kind, body }
    }

    pub(crate) fn not_found(message: &str) -> Self {
        Self::failure("404 Not Found", message)
    }

    pub(crate) fn failed(message: &str) -> Self {
        Self::failure("500 Internal Server Error", message)
    }

    fn failure(status: &'static str, message: &str) -> Self {
        Self { status, kind: "text/plain; charset=utf-8", body: format!("{message}\n") }
    }

    fn text(&self, is_head: bool) -> String {
        let Self { status, kind, body } = self;
        let length = body.len();
        let body = if is_head { "" } else { body };
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nAllow: GET, HEAD\r\n\
             Connection: close\r\n\r\n{body}"
        )
    }
}

/// A connection of any kind.
pub(crate) trait Stream: Read + Write + Send + 'static {
    /// How long a read and a write may take.
    fn set_timeouts(&self, timeout: Duration) -> io::Result<()>;

    /// There is nothing more to come.
    fn end(&self) -> io::Result<()>;
}

impl Stream for TcpStream {
    fn set_timeouts(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }

    fn end(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Stream for UnixStream {
    fn set_timeouts(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }

    fn end(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

/// Answers whoever comes, by the path that is asked for, as long as this process lives.
pub(crate) fn serve<S: Stream>(
    accept: impl Fn() -> io::Result<S> + Send + 'static,
    answer: impl Fn(&str) -> Response + Send + Sync + 'static,
) -> io::Result<()> {
    let accept_all = move || {
        let answer = Arc::new(answer);
        let connected = Arc::new(AtomicUsize::new(0));
        loop {
            match accept().and_then(|stream| begin(stream, &answer, &connected)) {
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!("a connection for metrics: {error}");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    };
    thread().spawn(accept_all).map(drop)
}

fn thread() -> thread::Builder {
    thread::Builder::new().name("coiommu-metrics".into())
}

/// One that is connected.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

fn begin<S: Stream>(
    stream: S,
    answer: &Arc<impl Fn(&str) -> Response + Send + Sync + 'static>,
    connected: &Arc<AtomicUsize>,
) -> io::Result<()> {
    let place = Place(Arc::clone(connected));
    if connected.fetch_add(1, Relaxed) >= CONNECTIONS {
        tracing::debug!("a connection for metrics is closed: {CONNECTIONS} are there");
        return Ok(());
    }
    let answer = Arc::clone(answer);
    thread().spawn(move || {
        let _place = place;
        // Who has gone, or takes too long, needs no answer.
        let _gone = converse(stream, &*answer);
    })?;
    Ok(())
}

fn converse(stream: impl Stream, answer: &impl Fn(&str) -> Response) -> io::Result<()> {
    let mut stream = Timed::new(stream);
    let text = match request(&mut stream)? {
        Request::Get(path) => answer(&path).text(false),
        Request::Head(path) => answer(&path).text(true),
        Request::Other => Response::failure("405 Method Not Allowed", "only GET and HEAD are").text(false),
        Request::Bad => Response::failure("400 Bad Request", "this is no request").text(false),
    };
    stream.deadline = Instant::now() + PATIENCE;
    stream.write_all(text.as_bytes())?;
    stream.stream.end()?;
    // What is closed with something unread takes the answer back.
    io::copy(&mut stream.take(REST), &mut io::sink()).map(drop)
}

/// A connection that has to be done with at some time, however often a little comes or goes.
struct Timed<S> {
    stream: S,
    deadline: Instant,
}

impl<S: Stream> Timed<S> {
    fn new(stream: S) -> Self {
        Self { stream, deadline: Instant::now() + PATIENCE }
    }

    fn begin(&self) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_timeouts(left)
    }
}

impl<S: Stream> Read for Timed<S> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.begin()?;
        self.stream.read(bytes)
    }
}

impl<S: Stream> Write for Timed<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.begin()?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// What is asked, with a path.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    Get(String),
    Head(String),
    /// By another method.
    Other,
    Bad,
}

/// Reads a request's head, and maybe some of what comes after it.
fn request(stream: &mut impl Read) -> io::Result<Request> {
    let mut head = Vec::with_capacity(1024);
    let mut piece = [0; 1024];
    loop {
        let length = stream.read(&mut piece)?;
        head.extend(piece.iter().take(length));
        if let Some(request) = parse(&head) {
            return Ok(request);
        }
        if length == 0 || head.len() >= HEAD {
            return Ok(Request::Bad);
        }
    }
}

/// What a head says. `None`: there is more to come.
fn parse(head: &[u8]) -> Option<Request> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(head) {
        Ok(httparse::Status::Partial) => return None,
        Ok(httparse::Status::Complete(_)) => {}
        Err(_) => return Some(Request::Bad),
    }
    let target = request.path.unwrap_or_default();
    let path = target.split_once('?').map_or(target, |(path, _query)| path).to_owned();
    Some(match request.method {
        Some("GET") => Request::Get(path),
        Some("HEAD") => Request::Head(path),
        _ => Request::Other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(bytes: &[u8]) -> Request {
        request(&mut &*bytes).unwrap()
    }

    #[test]
    fn heads_are_read() {
        let get = |path: &str| Request::Get(path.to_owned());
        assert_eq!(asked(b"GET / HTTP/1.0\r\n\r\n"), get("/"));
        assert_eq!(asked(b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\n\r\nGET /other"), get("/metrics"));
        assert_eq!(asked(b"HEAD /metrics HTTP/1.1\r\n\r\n"), Request::Head("/metrics".to_owned()));
        assert_eq!(asked(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"), Request::Other);
        for bad in [&b""[..], b"GET / HTTP/1.1\r\n", b"\0\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\xff\xfe\xfd\r\n\r\n"]
        {
            assert_eq!(asked(bad), Request::Bad, "{bad:?}");
        }
    }

    #[test]
    fn heads_have_an_end() {
        let with = |bytes: usize| [b"GET / HTTP/1.1\r\nA: ".to_vec(), vec![b'b'; bytes], b"\r\n\r\n".to_vec()].concat();
        assert_eq!(asked(&with(8000)), Request::Get("/".to_owned()));
        assert_eq!(asked(&with(HEAD + 1024)), Request::Bad);
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(FIELDS + 1));
        assert_eq!(asked(many.as_bytes()), Request::Bad);
    }
}
