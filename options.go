package dchannel

import (
	"errors"
	"fmt"
	"time"
)

// Defaults of the options.
const (
	// DefaultMaxMessage is the largest encoded message in bytes. It is the same on
	// every backend, and below the default limit of each server.
	DefaultMaxMessage = 1_000_000
	// DefaultTimeout is for how long a call without a sooner end of its context goes
	// on trying while the backend is unavailable.
	DefaultTimeout = 5 * time.Second
	// DefaultCloseKeep is for how long a close is remembered.
	DefaultCloseKeep = 24 * time.Hour
	// DefaultBuffer bounds, in bytes, what this process keeps of one channel for
	// handles that are slow.
	DefaultBuffer = 32 << 20
	// DefaultQueue bounds, in bytes, what PublishAsync may have waiting on one
	// channel in this process.
	DefaultQueue = 8 << 20
)

// Option changes how a handle works. An option with an unusable value is reported
// by the handle's first call, as ErrInvalidOption.
type Option func(*options)

type options struct {
	codec      Codec
	maxMessage int
	timeout    time.Duration
	closeKeep  time.Duration
	buffer     int
	queue      int
	start      Start
	err        error
}

var defaults = options{
	codec:      JSON,
	maxMessage: DefaultMaxMessage,
	timeout:    DefaultTimeout,
	closeKeep:  DefaultCloseKeep,
	buffer:     DefaultBuffer,
	queue:      DefaultQueue,
}

func newOptions(opts []Option) *options {
	if len(opts) == 0 {
		return &defaults
	}
	o := defaults
	for _, opt := range opts {
		if opt == nil {
			o.reject("an option is nil")
			continue
		}
		opt(&o)
	}
	return &o
}

func (o *options) reject(format string, args ...any) {
	o.err = errors.Join(o.err, fmt.Errorf("%w: "+format, append([]any{ErrInvalidOption}, args...)...))
}

// WithCodec sets how values that are neither string nor []byte are encoded. The
// default is [JSON]. All who use a channel should use one codec; who receives a
// message of another one gets an error that wraps ErrCodec.
func WithCodec(c Codec) Option {
	return func(o *options) {
		if c == nil {
			o.reject("WithCodec: the codec is nil")
		} else if n := len(c.Name()); n == 0 || n > MaxNameLen {
			o.reject("WithCodec: the codec's name has %d bytes, want 1 to %d", n, MaxNameLen)
		}
		o.codec = c
	}
}

// WithMaxMessage sets the largest encoded message, in bytes: what is larger is
// ErrTooLarge before anything is sent. The default is DefaultMaxMessage, which
// every server takes as it comes; more may need a setting of the server.
func WithMaxMessage(bytes int) Option {
	return func(o *options) {
		if bytes < 1 {
			o.reject("WithMaxMessage(%d): want at least 1", bytes)
		}
		o.maxMessage = bytes
	}
}

// WithTimeout sets for how long Publish, Close, Open and whatever attaches go on
// trying while the backend is unavailable, when their context does not end before.
// The default is DefaultTimeout. Listen on an attached handle waits for as long as
// its context allows: it resumes by itself.
func WithTimeout(d time.Duration) Option {
	return func(o *options) {
		if d <= 0 {
			o.reject("WithTimeout(%v): want more than 0", d)
		}
		o.timeout = d
	}
}

// WithCloseKeep sets for how long a close by this handle is remembered by the
// backend, at least: who attaches within that time learns of it. The default is
// DefaultCloseKeep.
func WithCloseKeep(d time.Duration) Option {
	return func(o *options) {
		if d < time.Second {
			o.reject("WithCloseKeep(%v): want at least 1s", d)
		}
		o.closeKeep = d
	}
}

// WithBuffer sets how many bytes of recent messages this process keeps for handles
// of the channel that are slow. A handle that is further behind reads from what the
// backend retains. One buffer serves all handles of a channel in a process; the
// largest setting counts. The default is DefaultBuffer.
func WithBuffer(bytes int) Option {
	return func(o *options) {
		if bytes < 1 {
			o.reject("WithBuffer(%d): want at least 1", bytes)
		}
		o.buffer = bytes
	}
}

// WithQueue sets how many bytes PublishAsync may have waiting on the channel in
// this process before it blocks. The default is DefaultQueue.
func WithQueue(bytes int) Option {
	return func(o *options) {
		if bytes < 1 {
			o.reject("WithQueue(%d): want at least 1", bytes)
		}
		o.queue = bytes
	}
}

// Start is where a handle begins to listen.
type Start struct {
	kind startKind
	pos  Position
}

type startKind uint8

const (
	fromNow startKind = iota
	fromOldest
	fromPosition
)

// FromNow begins with what is published after the attachment. The default.
func FromNow() Start { return Start{} }

// FromOldest begins with the oldest message that the backend retains.
func FromOldest() Start { return Start{kind: fromOldest} }

// After begins with the message that follows p, a position from an earlier
// Message or Status: so a listener that was restarted goes on where it was. What is
// no longer retained is reported as a LostError first.
func After(p Position) Start { return Start{kind: fromPosition, pos: p} }

// WithStart sets where the handle begins to listen.
func WithStart(s Start) Option {
	return func(o *options) {
		if s.kind == fromPosition && s.pos.Epoch == 0 && s.pos.Seq != 0 {
			o.reject("WithStart(After(%v)): a position without an epoch", s.pos)
		}
		o.start = s
	}
}
