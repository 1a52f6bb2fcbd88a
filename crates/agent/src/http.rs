//! The agent's listeners: the API over mutual TLS, the same API on a Unix socket, and the health paths.
//!
//! Responsible for: who is calling, whether they may, the limits that keep a stranger or a slow client from
//! costing anything, and the form of the answers. Leaves out every decision about the herd: a handler
//! calls the [`Backend`] and passes on what it says.
//!
//! Hazard: a route that forgets to ask who is calling. So a handler has to name what it needs as its first
//! parameter ([`caller`]), and a test goes through every route with every kind of credential.

mod answer;
pub mod backend;
mod body;
pub mod caller;
pub mod health;
mod listen;
mod origin;
mod sparingly;
mod stream;
mod v1;

pub use backend::Backend;
pub use health::HealthView;
pub use listen::{Stop, bind_socket, serve_health, serve_metrics, serve_socket, serve_tls};
pub use v1::Api;
