//! How many files this process may have open: each vCPU of a guest costs some.

use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit as far as it goes without asking anybody; nothing here minds high numbers, as `select` does.
pub(crate) fn raise_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!("the limit of open files stays as it is: {error}");
    }
}

/// Names the limit in an error that comes of it.
pub(crate) fn name_open_files(error: anyhow::Error) -> anyhow::Error {
    let is_limit = |cause: &io::Error| cause.raw_os_error() == Some(Errno::MFILE.raw_os_error());
    if !error.chain().filter_map(|cause| cause.downcast_ref()).any(is_limit) {
        return error;
    }
    let limit = getrlimit(Resource::Nofile).current.map_or_else(|| "none".to_owned(), |limit| limit.to_string());
    error.context(format!(
        "the limit of open files (RLIMIT_NOFILE, ulimit -n) is {limit}: raise it, or name fewer vCPUs"
    ))
}
