package dchannel

import (
	"context"
	"fmt"
	"sync"
)

// asyncState counts a handle's asynchronous messages.
type asyncState struct {
	mu      sync.Mutex
	waiting int
	failed  int
	first   error
	idle    chan struct{} // closed when waiting falls to 0; made on demand
}

func (a *asyncState) begin() {
	a.mu.Lock()
	a.waiting++
	a.mu.Unlock()
}

func (a *asyncState) end(n int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting -= n
	if err != nil {
		if a.failed == 0 {
			a.first = err
		}
		a.failed += n
	}
	if a.waiting == 0 && a.idle != nil {
		close(a.idle)
		a.idle = nil
	}
}

// flush waits until nothing is waiting, and returns and forgets the failures.
func (a *asyncState) flush(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.waiting > 0 {
		if a.idle == nil {
			a.idle = make(chan struct{})
		}
		idle := a.idle
		a.mu.Unlock()
		select {
		case <-idle:
		case <-ctx.Done():
			a.mu.Lock()
			return fmt.Errorf("%d messages still under way: %w", a.waiting, ctx.Err())
		}
		a.mu.Lock()
	}
	if a.failed == 0 {
		return nil
	}
	err := fmt.Errorf("%d messages failed, the first with: %w", a.failed, a.first)
	a.failed, a.first = 0, nil
	return err
}
