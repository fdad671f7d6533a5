package dmutex

import (
	"fmt"
	"time"

	"github.com/dchannel/dchannel"
)

// Option changes how a Mutex works. One with an unusable value is reported by the first
// call, as dchannel.ErrInvalidOption.
type Option func(*options)

type options struct {
	auto, fair, watch bool
	info              string
	timeout           time.Duration
	err               error
}

// WithAutoExtend renews a lock, a third of its ttl after each renewal, until Unlock: for
// work of unknown length. The ttl then is how long others wait for a holder that died. A
// holder that hangs, but lives, is waited for without end.
func WithAutoExtend() Option { return func(o *options) { o.auto = true } }

// WithInfo sets what others see of the holder, in [Holder.Info] and in their
// dchannel.LockedError: at most dchannel.MaxLockInfo bytes of UTF-8.
func WithInfo(info string) Option { return func(o *options) { o.info = info } }

// WithFair makes Lock first come, first served, across processes. Where the backend cannot
// do that, Lock fails with errors.ErrUnsupported. TryLock does not line up, and does not
// get past those who do.
func WithFair() Option { return func(o *options) { o.fair = true } }

// WithLossWatch has the holder watch its lock in the backend, so that Context ends as soon
// as the backend tells of a loss. Without it a loss is noticed when the lock is renewed
// next, and without WithAutoExtend not before the lock's own time is over. It costs a
// watch, and a read or two, for every lock.
func WithLossWatch() Option { return func(o *options) { o.watch = true } }

// WithTimeout sets for how long calls go on trying while the backend is unavailable, when
// their context does not end before: dchannel.DefaultTimeout by default. Those that wait
// (Lock, WaitUntilUnlocked, Do) wait over outages, for as long as their context allows.
func WithTimeout(d time.Duration) Option {
	return func(o *options) {
		if d <= 0 {
			o.err = fmt.Errorf("%w: WithTimeout(%v): want more than 0", dchannel.ErrInvalidOption, d)
		}
		o.timeout = d
	}
}
