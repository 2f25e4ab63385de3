//! What a service manager is told that has started this, as systemd does for a unit of `Type=notify`.

use sd_notify::NotifyState;

/// The sockets are there: who comes after this may connect. Nobody is told where nobody asked (`NOTIFY_SOCKET`).
pub(crate) fn ready() {
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        tracing::warn!("the service manager cannot be told that the sockets are there: {error}");
    }
}
