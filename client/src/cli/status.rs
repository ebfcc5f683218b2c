//! `uncloud status`.

use uncloud_proto::v1;

use super::{Context, Error};
use crate::output;

pub(crate) async fn run(context: &Context) -> Result<(), Error> {
    let answer = context.client.get_status(v1::GetStatusRequest {}).await?;
    context.print(&answer, |a| output::status(a, context.now()))
}
