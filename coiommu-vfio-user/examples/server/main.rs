//! A device of its own for QEMU, or for whoever speaks vfio-user: `device.rs` is the device, this is the server around it.
//!
//! `cargo run -p coiommu-vfio-user --example server -- /tmp/sum.sock`, then
//!
//! ```sh
//! qemu-system-x86_64 -machine q35,memory-backend=ram -object memory-backend-memfd,id=ram,size=1G,share=on \
//!     -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/sum.sock"}}' …
//! ```
//!
//! It serves one client after the other, and ends when its standard input does (Ctrl-D).

mod device;

use std::error::Error;
use std::io::stdin;
use std::os::fd::AsFd;
use std::time::Duration;

use coiommu_vfio_user::{Connection, Limits, Listener};
use device::Device;
use rustix::event::{PollFd, PollFlags, poll};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("which path is the socket to have?")?;
    let listener = Listener::bind(path)?;
    println!("listening at {}", listener.path().display());
    let input = stdin();
    let stop = input.as_fd();
    loop {
        let mut fds = [PollFd::new(&stop, PollFlags::IN), PollFd::new(&listener, PollFlags::IN)];
        poll(&mut fds, None)?;
        if !fds[0].revents().is_empty() {
            return Ok(());
        }
        let Some(client) = listener.accept()? else { continue };
        println!("a client comes");
        let mut connection = Connection::new(client, Limits::default());
        // A client that goes takes its memory and its eventfds with it: so does this device.
        let mut device = Device::new()?;
        match device.serve(&mut connection, Some(stop)) {
            Ok(true) => println!("it has gone"),
            Ok(false) => {
                connection.close(Duration::from_secs(1));
                return Ok(());
            }
            Err(error) => println!("it is not served any more: {error}"),
        }
        // Whoever came meanwhile sees that it is in vain.
        listener.turn_away()?;
    }
}
