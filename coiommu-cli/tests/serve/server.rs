//! The program, running in a folder of its own.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::common::coiommu;
use crate::lines::Lines;
use crate::{PATIENCE, wait_for};

/// Guest addresses of the endpoints that every server here has.
pub(crate) const ENDPOINTS: [u16; 2] = [3 << 3, 1 << 8 | 2 << 3 | 1];
/// How many vCPUs.
pub(crate) const VCPUS: usize = 4;

/// `coiommu serve`. Killed when it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) folder: TempDir,
    child: Child,
}

/// What a server has come to.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) log: String,
    pub(crate) folder: TempDir,
}

impl Server {
    /// Starts one, and waits until a VMM may come.
    pub(crate) fn start(options: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), options)
    }

    pub(crate) fn start_in(folder: TempDir, options: &[&str]) -> Self {
        let mut server = Self::launch(folder, options);
        wait_for("a server", || {
            assert_eq!(server.child.try_wait().unwrap(), None, "{}", server.log());
            server.log().contains("waiting for a VMM").then_some(())
        });
        server
    }

    /// Starts one; it may end at once. `{}` in an option is the folder.
    pub(crate) fn launch(folder: TempDir, options: &[&str]) -> Self {
        let log = File::create(folder.path().join("log")).unwrap();
        Self::launch_with(folder, options, log.into())
    }

    pub(crate) fn launch_with(folder: TempDir, options: &[&str], stderr: Stdio) -> Self {
        let child = Self::command(&folder, options).stderr(stderr).spawn().unwrap();
        Self { folder, child }
    }

    /// Starts one for a service manager, which listens at a socket.
    pub(crate) fn launch_under(manager: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let log = File::create(folder.path().join("log")).unwrap();
        let child = Self::command(&folder, &[]).env("NOTIFY_SOCKET", manager).stderr(log).spawn().unwrap();
        Self { folder, child }
    }

    fn command(folder: &TempDir, options: &[&str]) -> Command {
        let at = folder.path().to_str().unwrap().to_owned();
        let mut command = coiommu(["serve", "--vcpus", &VCPUS.to_string()]);
        command.args(["--endpoint", "00:03.0", "--endpoint", "01:02.1"]);
        command.arg("--socket").arg(folder.path().join("vm.sock"));
        command.arg("--control").arg(folder.path().join("vm.ctl"));
        command.args(options.iter().map(|option| option.replace("{}", &at)));
        command.env_remove("RUST_LOG").env_remove("NOTIFY_SOCKET").stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("vm.sock")
    }

    pub(crate) fn control_path(&self) -> PathBuf {
        self.path("vm.ctl")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A connection to its control socket.
    pub(crate) fn control(&self) -> Lines {
        Lines::connect(&self.control_path())
    }

    /// Connects to its socket, and says nothing.
    pub(crate) fn visit(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        log_in(self.folder.path())
    }

    /// Waits until it has logged something so often.
    #[track_caller]
    pub(crate) fn wait_for_log(&self, text: &str, times: usize) {
        wait_for(text, || (self.log().matches(text).count() >= times).then_some(()));
    }

    /// A file of `/proc` about it.
    pub(crate) fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.child.id()))
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until it has ended.
    #[track_caller]
    pub(crate) fn end(mut self) -> Ended {
        let status = wait_for("the server's end", || self.child.try_wait().unwrap());
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap());
        Ended { status, log: log_in(folder.path()), folder }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ended = self.child.kill();
        let _status = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the server's log:\n{}", self.log());
        }
    }
}

impl Ended {
    /// It ended well, and left nothing but its log.
    #[track_caller]
    pub(crate) fn assert_well(&self) {
        assert_eq!(self.status.code(), Some(0), "{}", self.log);
        assert_eq!(names_in(self.folder.path()), ["log"]);
    }

    /// What it said last, having failed.
    #[track_caller]
    pub(crate) fn complaint(&self) -> &str {
        assert_eq!(self.status.code(), Some(1), "{}", self.log);
        self.log.lines().last().unwrap().strip_prefix("coiommu: ").unwrap()
    }
}

/// Files in a folder, sorted.
pub(crate) fn names_in(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

fn log_in(folder: &Path) -> String {
    fs::read_to_string(folder.join("log")).unwrap_or_default()
}
